"""The settings of an evaluation of retrieval: every key, its default, and its allowed values."""

from dataclasses import dataclass, fields, replace
from typing import Any

from fused.io.picture import Size
from fused.io.preprocessing import Preprocessing
from fused.rules import COUNT, COUNT_OR_0, FLAG
from fused.train.config import RULES as TRAINING_RULES

CLIP_KEYS = ("frames", "size", "sampling", "stride", "fps", "short", "crop", "first_seconds")


@dataclass(frozen=True)
class RetrievalSettings:
    """The settings of an evaluation of retrieval, or of a search.

    Raises ValueError at construction; the message names the key, its value and the allowed values.
    """

    vocabulary: str | None = None  # BERT's vocab.txt; None: that of the model's folder
    text_length: int | None = None  # word pieces of a text; None: the model's
    prefix: str | None = None  # the folder of the captions' paths; None: that of their file
    paragraph: bool = False  # whether a list of captions is one text
    merge_captions: bool = False  # whether captions that are the same are one text, which several videos answer rightly
    rerank: int = 128  # candidates of each query that are matched; 0: none
    dual_softmax: bool = False  # also rank by cosines that are weighted over all queries
    frames: int | None = None  # frames to first_seconds: None for the model's own
    size: Size | None = None
    sampling: str | None = None
    stride: int | None = None
    fps: int | float | None = None
    short: str | None = None
    crop: str | None = None
    first_seconds: int | float | None = None
    frame_pattern: str | None = None
    batch_size: int = 8  # videos in one forward of a process
    workers: int = 2  # decoding processes for each process
    precision: str = "float32"
    backend: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        for f in fields(self):
            _RULES[f.name].check(f.name, getattr(self, f.name))

    def changed(self, preprocessing: Preprocessing) -> Preprocessing:
        """Return a preprocessing with the fields that are set."""
        given = {name: value for name in CLIP_KEYS if (value := getattr(self, name)) is not None}
        return replace(preprocessing, **given)

    def model_fields(self) -> dict[str, Any]:
        """Return the arguments of `VideoTextRetrieval.from_pretrained` that are set."""
        given = {"vocabulary": self.vocabulary, "num_frames": self.frames, "img_size": self.size, "backend": self.backend}
        return {name: value for name, value in given.items() if value is not None}


_RULES = (
    {name: TRAINING_RULES[f"data.{name}"].optional() for name in CLIP_KEYS}
    | {name: TRAINING_RULES[f"data.{name}"] for name in ("prefix", "frame_pattern", "paragraph")}
    | {name: TRAINING_RULES[name] for name in ("precision", "backend", "device")}
    | {"vocabulary": TRAINING_RULES["text.vocabulary"], "text_length": TRAINING_RULES["text.length"].optional()}
    | dict.fromkeys(("merge_captions", "dual_softmax"), FLAG)
    | {"rerank": COUNT_OR_0, "batch_size": COUNT, "workers": COUNT_OR_0}
)
