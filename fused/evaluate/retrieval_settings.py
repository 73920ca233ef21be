"""The settings of an evaluation of retrieval: every key, its default, and its allowed values."""

from dataclasses import dataclass, fields, replace
from typing import Any

from fused.evaluate.settings import key
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

    vocabulary: str | None = key(None, "BERT's vocab.txt; null: that of the model's folder")
    text_length: int | None = key(None, "word pieces of a text; null: the model's")
    prefix: str | None = key(None, "the folder of the captions' paths; null: that of their file")
    paragraph: bool = key(False, "whether a list of captions is one text")
    merge_captions: bool = key(False, "whether captions that are the same are one text, which several videos answer rightly")
    rerank: int = key(128, "candidates of each query that are matched; 0: none")
    dual_softmax: bool = key(False, "also rank by cosines that are weighted over all queries")
    frames: int | None = key(None, "frames of a clip; null: the model's own, as of the next seven keys")
    size: Size | None = key(None, "pixels of a side, or [height, width]")
    sampling: str | None = key(None, "segments, dense (neighbours, `stride` apart) or borders (as upstream's retrieval)")
    stride: int | None = key(None, "frames from one to the next, for dense sampling")
    fps: int | float | None = key(None, "frames a second at which the video is shown before frames are chosen")
    short: str | None = key(None, "what becomes of a video of too few frames: drop, loop or last")
    crop: str | None = key(None, "centre, or stretch (whatever the aspect is)")
    first_seconds: int | float | None = key(None, "of a video, that are read")
    frame_pattern: str | None = key(None, "of the images in folders of frames, such as img_*.jpg; null: all")
    batch_size: int = key(8, "videos in one forward of a process")
    workers: int = key(2, "decoding processes for each process")
    precision: str = key("float32", "float32, bfloat16 or float16")
    backend: str = key("auto", "see fused.backends")
    device: str = key("auto", "auto, cpu or cuda")

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
