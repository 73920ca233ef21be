"""Folders of a video-text model: config.json, model.safetensors and vocab.txt side by side; and published files."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from fused.io.atomic_write import atomic_write
from fused.io.checkpoint_file import CheckpointError, read_json_object, save_checkpoint
from fused.io.preprocessing import Preprocessing
from fused.models.retrieval.config import RetrievalConfig
from fused.models.retrieval.load import config_of, load_weights, read_weights
from fused.models.retrieval.words import Tokenizer
from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.hub import CONFIG, FOLLOWED, WEIGHTS, download, with_tuples
from fused.models.videomamba.published import PRETRAINED

T = TypeVar("T", bound="Pretrained")
VOCABULARY = "vocab.txt"
KIND = "videomamba-retrieval"  # model_type in config.json
TEXT_LENGTH = 32  # of captions in upstream's pretraining
PUBLISHED = {name: one for name, one in PRETRAINED.items() if one.model == "VideoMambaEncoder" and one.config.add_pool_norm}


class Pretrained:
    """`from_pretrained` and `save_pretrained` of a `VideoTextRetrieval`."""

    config: RetrievalConfig
    vocabulary: Path | None
    preprocessing: Preprocessing | None
    text_length: int = TEXT_LENGTH

    @classmethod
    def from_pretrained(
        cls: type[T], source: str | Path, *, vocabulary: str | Path | None = None, backend: str = "auto", **overrides: Any
    ) -> T:
        """Return a model on the CPU, in eval mode, with weights.

        `source` is a folder that `save_pretrained` wrote, a file in upstream's layout, or one of the published models
        videomamba_m16_5M_f8_res224, _17M_ and _25M_, which huggingface_hub downloads. Sizes are those of the folder's
        config.json, or of the file's tensors. `overrides` are fields of `RetrievalConfig`, or of its video encoder's
        `VideoMambaConfig`, that differ, such as num_frames. `vocabulary` is BERT's vocab.txt, by default the folder's.

        Raises FileNotFoundError for a missing file or folder, CheckpointError for weights that do not fit, ValueError for a
        vocabulary of another size and for wrong fields, NotDownloaded, a ConnectionError, without the file.
        """
        path = Path(os.path.expanduser(source))
        preprocessing, length, weights = None, TEXT_LENGTH, path
        if path.is_dir():
            config, preprocessing, length = _read_config(path / CONFIG, overrides)
            weights = path / WEIGHTS
            if vocabulary is None and (path / VOCABULARY).is_file():
                vocabulary = path / VOCABULARY
        else:
            if not path.exists() and str(source) in PUBLISHED:
                weights = download(PUBLISHED[str(source)].repository, PUBLISHED[str(source)].file)
            elif not path.exists():
                allowed = f"a folder of save_pretrained, a file of video_mm, or {', '.join(PUBLISHED)}"
                raise FileNotFoundError(2, f"there is no such model; allowed: {allowed}", str(path))
            config = config_of(read_weights(weights)[1], **overrides)
        if vocabulary is not None:
            Tokenizer(vocabulary).check_size(config.vocab_size)
        model: Any = cls(config, backend)  # type: ignore[call-arg]
        load_weights(model, weights)
        model.vocabulary = None if vocabulary is None else Path(os.path.expanduser(vocabulary))
        model.preprocessing, model.text_length = preprocessing, length
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json, model.safetensors and, if there is one, vocab.txt, each atomically; return the folder."""
        folder = Path(os.path.expanduser(folder))
        folder.mkdir(parents=True, exist_ok=True)
        config = replace(self.config, video=replace(self.config.video, pretrained=None))
        description: dict[str, Any] = {"model_type": KIND, **asdict(config), "text_length": self.text_length}
        if self.preprocessing is not None:
            description["preprocessing"] = asdict(self.preprocessing)
        if self.vocabulary is not None and self.vocabulary.resolve() != (folder / VOCABULARY).resolve():
            with atomic_write(folder / VOCABULARY) as draft:
                shutil.copyfile(self.vocabulary, draft)
        with atomic_write(folder / CONFIG) as draft:
            draft.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            save_checkpoint(self, folder / WEIGHTS)  # type: ignore[arg-type]
        return folder

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the model's vocabulary. Raises ValueError for a model without one."""
        if self.vocabulary is None:
            raise ValueError("the model has no vocabulary; allowed: vocabulary=FILE, BERT's vocab.txt")
        return Tokenizer(self.vocabulary)


def is_video_text(source: str | Path) -> bool:
    """Return whether a path is a folder of `save_pretrained`, or a file that holds a text encoder."""
    path = Path(os.path.expanduser(source))
    try:
        if path.is_dir():
            return read_json_object(path / CONFIG).get("model_type") == KIND
        if path.is_file():
            read_weights(path)
            return True
    except (CheckpointError, OSError):
        return False
    return str(source) in PUBLISHED


def _read_config(path: Path, overrides: dict[str, Any]) -> tuple[RetrievalConfig, Preprocessing | None, int]:
    """Return configuration, preprocessing and text length of a folder. Raises CheckpointError, FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(2, "the folder holds no configuration", str(path))
    given = read_json_object(path)
    if given.pop("model_type", None) != KIND:
        raise CheckpointError(f"{path} is no configuration of a video-text model: its model_type is not {KIND!r}")
    try:
        preprocessing, length = given.pop("preprocessing", None), given.pop("text_length", TEXT_LENGTH)
        names = RetrievalConfig.__dataclass_fields__
        video = VideoMambaConfig(**with_tuples(given.pop("video")) | {k: v for k, v in overrides.items() if k not in names})
        config = RetrievalConfig(video, **given | {k: v for k, v in overrides.items() if k in names})
        if preprocessing is None:
            return config, None, length
        changes = {FOLLOWED[key]: value for key, value in overrides.items() if key in FOLLOWED}
        return config, Preprocessing(**with_tuples(preprocessing) | changes), length
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is no configuration of a video-text model: {error}") from error
