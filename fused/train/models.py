"""The models of a configuration: the student with its initial weights, and the teacher."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused.models.retrieval.config import RetrievalConfig
from fused.models.retrieval.hub import VOCABULARY, is_video_text
from fused.models.retrieval.load import load_bert
from fused.models.retrieval.model import VideoTextRetrieval
from fused.models.retrieval.words import Tokenizer
from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.hub import NotDownloaded, near_names
from fused.models.videomamba.load import load_checkpoint
from fused.models.videomamba.model import VideoMambaEncoder
from fused.models.videomamba.published import PRETRAINED
from fused.rules import invalid
from fused.runtime.graphed import graphed
from fused.train.config import TrainConfig
from fused.train.config_keys import OWNERS
from fused.train.objectives.masks import MASKS
from fused.train.objectives.teachers import ClipTeacher

SOURCES = "a folder that save_pretrained wrote, a name in fused.PRETRAINED"


@dataclass(frozen=True)
class Teacher:
    """A frozen model and the sizes of its output for clips (B, C, T, H, W)."""

    forward: Callable[[Tensor], tuple[Tensor, Tensor | None]]  # features (K, B, L, C), attention (B, T, P) or None
    layers: int  # K
    width: int  # C
    grid: tuple[int, int, int]  # tubelets, rows, columns; L is their product + 1

    def check_tokens(self, student: VideoMambaConfig) -> None:
        """Raise ValueError unless the student has the same grid of tokens."""
        if (student.tubelets, *student.grid) != self.grid:
            ours, theirs = ("{}x{}x{}".format(*grid) for grid in ((student.tubelets, *student.grid), self.grid))
            raise ValueError(f"teacher has {theirs} tokens in time, rows and columns; allowed: {ours}, as the model")


def make_student(kind: Any, config: TrainConfig, required: dict[str, Any]) -> Any:
    """Return the model, of class `kind`, with its initial weights.

    `required` holds the fields of VideoMambaConfig that data and teacher determine. Raises ValueError where the configuration
    sets one of them otherwise, and the errors of loading weights.
    """
    for key, value in required.items():
        if config.model.get(key, value) != value:
            raise ValueError(f"model.{key} is {config.model[key]!r}; allowed: {value}, which follows from data and teacher")
    model_fields, start = _model_fields(config) | required, config.start
    with _errors_with_keys("start"):
        if start is None or Path(start).is_file():
            model_config = getattr(VideoMambaConfig, config.model.get("size") or "tiny")(**model_fields)
            model = kind(model_config, backend=config.backend)
            if start is not None:
                load_checkpoint(model, start, inflate=config.inflate)
        else:
            _check_source("start", start, f"{SOURCES}, or a file of weights")
            model = kind.from_pretrained(start, backend=config.backend, inflate=config.inflate, **model_fields)
    model.preprocessing = config.data.preprocessing
    return model


def make_video_text(config: TrainConfig, required: dict[str, Any]) -> VideoTextRetrieval:
    """Return the video-text model with its initial weights.

    `start` may be a whole one, a folder or a file of video_mm; or as for `make_student` its video encoder, beside which
    `text.start` is a plain BERT. `required` holds the fields of VideoMambaConfig that data and teacher determine. Raises
    ValueError, FileNotFoundError and the errors of loading weights.
    """
    start, text = config.start, config.text
    whole = start is not None and is_video_text(start)
    if text.vocabulary is None and not (whole and (Path(str(start)) / VOCABULARY).is_file()):
        raise invalid("text.vocabulary", None, "BERT's vocab.txt, or a start that is a folder with one")
    if whole:
        for key, value in (("text.start", text.start), ("model.size", config.model.get("size"))):
            if value is not None:
                raise invalid(key, value, f"null, since start ({start}) is a whole video-text model")
        video = {**_model_fields(config), **required, **text.bert}
        with _errors_with_keys("start"):
            model = VideoTextRetrieval.from_pretrained(
                str(start), vocabulary=text.vocabulary, backend=config.backend, **video
            )  # fmt: skip
    else:
        encoder = make_student(VideoMambaEncoder, config, {**required, "add_pool_norm": True})
        size = Tokenizer(str(text.vocabulary)).size
        model = VideoTextRetrieval(RetrievalConfig(video=encoder.config, vocab_size=size, **text.bert), config.backend)
        model.vision_encoder, model.vocabulary = encoder, Path(str(text.vocabulary))
        if text.start is not None:
            load_bert(model, text.start)
    model.preprocessing, model.text_length = config.data.preprocessing, text.length
    return model


def pretraining_teacher(config: TrainConfig, device: torch.device) -> Teacher:
    """Return the teacher of pretraining: CLIP if `teacher` is a folder of a transformers model, otherwise a VideoMamba.

    Raises ValueError for a mask by attention with a VideoMamba, and the errors of loading either.
    """
    description = Path(str(config.teacher)) / "config.json"
    if description.is_file():
        try:
            content = json.loads(description.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested too deeply
            raise ValueError(f"teacher is {config.teacher!r}, whose config.json cannot be read: {error}") from error
        if "architectures" in content:
            return _clip_teacher(config, device)
    teacher = videomamba_teacher(config, device)
    if config.mask.kind == "attention":
        raise invalid("mask.kind", "attention", f"with a VideoMamba as teacher, which has none, {', '.join(MASKS)}")
    return teacher


def videomamba_teacher(config: TrainConfig, device: torch.device) -> Teacher:
    """Return a VideoMamba as teacher, of either class: its tokens after the final norm, as one layer, without its heads."""
    options: dict[str, Any] = {"clip_return_layer": 0, "add_pool_norm": False, "distill_dim": None}
    options |= {"img_size": config.data.size, "num_frames": config.data.frames}
    _check_source("teacher", str(config.teacher), f"{SOURCES}, or for pretraining a folder of a CLIP of transformers")
    with _errors_with_keys("teacher"):
        model = VideoMambaEncoder.from_pretrained(str(config.teacher), backend=config.backend, **options)
    tokens: Callable[[Tensor], Tensor] = _Tokens(model.to(device).requires_grad_(False)).eval()
    if device.type == "cuda" and config.graph != "off":
        tokens = graphed(tokens)  # type: ignore[arg-type]

    def forward(clips: Tensor) -> tuple[Tensor, Tensor | None]:
        return tokens(clips)[None], None

    return Teacher(forward, 1, model.config.embed_dim, (model.config.tubelets, *model.config.grid))


class _Tokens(nn.Module):
    """An encoder up to its final norm."""

    def __init__(self, model: VideoMambaEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> Tensor:
        """Return all tokens (B, L, C) of clips (B, C, T, H, W)."""
        return self.model.encode(self.model.embed(clips))[0]


def _clip_teacher(config: TrainConfig, device: torch.device) -> Teacher:
    """Return CLIP as teacher, with the last model.clip_return_layer of its layers."""
    # only the student's clips, tokens and layers matter here; the teacher determines its other fields
    with _errors_with_keys("teacher"):
        student = VideoMambaConfig(**_model_fields(config))
    clip = ClipTeacher.from_pretrained(str(config.teacher), student)
    clip.model.to(device)
    return Teacher(clip, len(clip.layers), clip.width, (student.tubelets, *student.grid))


def _model_fields(config: TrainConfig) -> dict[str, Any]:
    """Return the fields of VideoMambaConfig that the configuration sets."""
    given = {key: value for key, value in config.model.items() if key != "size"}
    return given | {"img_size": config.data.size, "num_frames": config.data.frames}


def _check_source(key: str, source: str, allowed: str) -> None:
    """Raise FileNotFoundError or ValueError unless `source`, the value of `key`, is a folder or a published model.

    Whatever else it is, it is not asked of a hub: a mistyped path often looks like the name of a repository there.
    """
    if source in PRETRAINED or Path(source).is_dir():
        return
    if Path(source).exists():
        raise ValueError(f"{key} is {source!r}, a file; allowed: {allowed}")
    if "/" in source or Path(source).suffix:
        advice = "a repository of the Hugging Face hub has to be downloaded first (hf download NAME --local-dir FOLDER)"
        raise FileNotFoundError(f"{key} is {source!r}, and there is no such folder or file; allowed: {allowed}; {advice}")
    raise ValueError(f"{key} is {source!r}, no folder and no published model; allowed: {allowed}; {near_names(source)}")


@contextmanager
def _errors_with_keys(key: str) -> Iterator[None]:
    """Change errors of a model or of its weights, which `key` says, so that they name keys of the configuration."""
    try:
        yield
    except NotDownloaded as error:
        name = error.url.rpartition("/")[2]
        cause = f"{type(error.__cause__).__name__}: {error.__cause__}"
        file = f", or fetch {error.url} and set start={name} model.size=..." if key == "start" else ""
        raise ConnectionError(
            f"{key} is a published model, and {name} is neither in the cache nor can it be downloaded ({cause}). Where there "
            f"is a network, run the command with --dry-run and copy the cache of huggingface_hub (HF_HOME){file}"
        ) from error
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        if name in {f.name for f in fields(VideoMambaConfig)}:
            raise ValueError(f"{OWNERS.get(name, f'model.{name}')} {rest}") from error
        raise
