"""Weights of a video-text model: the published files of video_mm, those of fine-tunings of them, and plain BERT to begin with.

Upstream's files hold the parameters of a `VideoTextRetrieval` under the same names, and besides

    clip_teacher.*                                  the teacher of the pretraining, which is dropped
    text_encoder.bert.embeddings.position_ids       0, 1, 2, ..., which is dropped
    text_encoder.cls.predictions.decoder.*          the word embeddings and the bias again, which is checked and dropped

A model that was fine-tuned without the head for masked words has no "bert." behind "text_encoder."; here it always has.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused.io.checkpoint_file import CheckpointError, read_checkpoint
from fused.models.retrieval.config import RetrievalConfig
from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.layouts import WRAPPERS, plain_name
from fused.models.videomamba.load import LoadReport, load_checkpoint

VISION, TEXT, WORDS_HEAD = "vision_encoder.", "text_encoder.", "text_encoder.cls."
EMBEDDINGS = "text_encoder.bert.embeddings."
HEAD_WIDTH = 64  # of BERT base and large: files do not say how many heads there are
UNUSED = {
    "clip_teacher.": "the teacher of a pretraining",
    EMBEDDINGS + "position_ids": "numbers of positions, no weights",
    "text_encoder.bert.pooler.": "a pooler, which is not read",
}

_log = logging.getLogger("fused")


def read_weights(path_or_state_dict: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    """Return what the source is called, its tensors by the names of a `VideoTextRetrieval`, and what was dropped, with reasons.

    Raises FileNotFoundError, and CheckpointError for a file without a text encoder.
    """
    source, content = "state_dict", path_or_state_dict
    if not isinstance(content, Mapping):
        source, content = str(content), read_checkpoint(content)
    while wrapper := next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None):
        content = content[wrapper]
    tensors: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    for full, value in content.items():
        name = _name(str(full))
        reason = next((why for start, why in UNUSED.items() if name.startswith(start)), None)
        if reason is None and not isinstance(value, Tensor):
            reason = f"a {type(value).__name__}, no tensor"
        if reason is not None:
            dropped[name] = reason
        else:
            tensors[name] = value
    if EMBEDDINGS + "word_embeddings.weight" not in tensors:
        raise CheckpointError(f"{source} holds no text encoder of a video-text model, {EMBEDDINGS}word_embeddings.weight")
    tied = {"decoder.weight": tensors[EMBEDDINGS + "word_embeddings.weight"]}
    tied["decoder.bias"] = tensors.get(WORDS_HEAD + "predictions.bias", torch.empty(0))
    for name, value in tied.items():
        twin = tensors.pop(WORDS_HEAD + "predictions." + name, None)
        if twin is None:
            continue
        if not torch.equal(twin, value):
            raise CheckpointError(f"{source}: {WORDS_HEAD}predictions.{name} differs from what it is tied to in this model")
        dropped[WORDS_HEAD + "predictions." + name] = "the same as what it is tied to"
    return source, tensors, dropped


def _name(full: str) -> str:
    """Return the name in a `VideoTextRetrieval`: without wrappers' parts, and with "bert." behind "text_encoder."."""
    name = plain_name(full).removeprefix("module.")
    inner = name.removeprefix(TEXT)
    if name.startswith(TEXT) and inner.startswith(("embeddings.", "encoder.", "pooler.")):
        return f"{TEXT}bert.{inner}"
    return name


def config_of(tensors: Mapping[str, Tensor], **overrides: Any) -> RetrievalConfig:
    """Return the configuration that the shapes of a file's tensors tell, changed by `overrides`.

    These are fields of `RetrievalConfig`, or of the `VideoMambaConfig` of its video encoder. Raises CheckpointError for
    tensors that are missing, ValueError for what does not go together.
    """
    try:
        fields = dict(_text_fields(tensors))
        video = dict(_video_fields(tensors))
    except KeyError as error:
        raise CheckpointError(f"this is no complete video-text model: it has no {error.args[0]}") from error
    names = RetrievalConfig.__dataclass_fields__
    fields |= {key: value for key, value in overrides.items() if key in names}
    video |= {key: value for key, value in overrides.items() if key not in names}
    return RetrievalConfig(**{"video": VideoMambaConfig(**video)} | fields)


def _text_fields(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Any]]:
    words = tensors[EMBEDDINGS + "word_embeddings.weight"]
    layer = re.compile(r"text_encoder\.bert\.encoder\.layer\.(\d+)\.(\w+)")
    numbers = [(int(m[1]), m[2]) for name in tensors if (m := layer.match(name))]
    yield "vocab_size", words.shape[0]
    yield "hidden_size", words.shape[1]
    yield "num_attention_heads", max(1, words.shape[1] // HEAD_WIDTH)
    yield "num_hidden_layers", 1 + max((i for i, _ in numbers), default=0)
    yield "fusion_layer", min((i for i, part in numbers if part == "crossattention"), default=0)
    yield "intermediate_size", tensors["text_encoder.bert.encoder.layer.0.intermediate.dense.weight"].shape[0]
    yield "max_position_embeddings", tensors[EMBEDDINGS + "position_embeddings.weight"].shape[0]
    yield "embed_dim", tensors["vision_proj.weight"].shape[0]
    yield "mlm", any(name.startswith(WORDS_HEAD) for name in tensors)


def _video_fields(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Any]]:
    patch, positions = tensors[VISION + "patch_embed.proj.weight"], tensors[VISION + "pos_embed"]
    layers = [int(m[1]) for name in tensors if (m := re.match(r"vision_encoder\.layers\.(\d+)\.", name))]
    decoders = [int(m[1]) for name in tensors if (m := re.match(r"vision_encoder\.clip_decoder\.(\d+)\.", name))]
    yield "embed_dim", patch.shape[0]
    yield "patch_size", patch.shape[-1]
    yield "kernel_size", patch.shape[2]
    yield "img_size", round((positions.shape[1] - 1) ** 0.5) * patch.shape[-1]
    yield "num_frames", tensors[VISION + "temporal_pos_embedding"].shape[1] * patch.shape[2]
    yield "depth", 1 + max(layers, default=0)
    yield "clip_return_layer", 1 + max(decoders, default=-1)
    yield "clip_norm_type", "none"
    if decoders:
        yield "clip_output_dim", tensors[VISION + "clip_decoder.0.head.weight"].shape[0]


def load_weights(model: Any, path_or_state_dict: str | Path | Mapping[str, Any]) -> LoadReport:
    """Load a published file, one of a fine-tuning, or a state_dict into a `VideoTextRetrieval`, and return the report.

    The video encoder's weights are converted as by `fused.load_checkpoint`: other numbers of frames, other sizes. A head for
    masked words that only one of both has is left out, and reported. Everything else has to fit: CheckpointError is raised for
    tensors that are missing, unknown or of another shape, and the model is unchanged.
    """
    source, tensors, dropped = read_weights(path_or_state_dict)
    report = LoadReport(source, "video_mm", dropped=dropped)
    inner = {name.removeprefix(VISION): value for name, value in tensors.items() if name.startswith(VISION)}
    rest = {name: value for name, value in tensors.items() if not name.startswith(VISION)}
    parameters = {plain_name(name): p for name, p in model.named_parameters()}
    ours = {name: p for name, p in parameters.items() if not name.startswith(VISION)}
    _copy(source, rest, ours, report, model.config, lambda: _load_vision(model, inner, source, report))
    _log.log(logging.WARNING if report.initial else logging.INFO, "%s", report)
    return report


def _load_vision(model: Any, tensors: dict[str, Tensor], source: str, report: LoadReport) -> None:
    """Load the video encoder, and add its lines to the report."""
    if not tensors:
        raise CheckpointError(f"{source} has no video encoder, whose names begin with {VISION}")
    found = load_checkpoint(model.vision_encoder, tensors)
    report.loaded += [VISION + name for name in found.loaded]
    for ours, theirs in ((report.converted, found.converted), (report.initial, found.initial), (report.dropped, found.dropped)):
        ours.update({VISION + name: why for name, why in theirs.items()})


def load_bert(model: Any, path: str | Path) -> LoadReport:
    """Load a plain BERT, to begin a training with, into the text encoder of a `VideoTextRetrieval`, and return the report.

    `path` is a file, or a folder with model.safetensors or pytorch_model.bin, such as bert-base-uncased's. The attention to
    the video, and a head for masked words that is missing, are left at their initial values. Raises FileNotFoundError, and
    CheckpointError for a BERT of another size.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise FileNotFoundError(2, "no model.safetensors or pytorch_model.bin in the folder", str(path))
        path = found
    renamed = {}
    for full, value in read_checkpoint(path).items():
        name = full.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if isinstance(value, Tensor) and not name.startswith("cls.seq_relationship."):
            renamed[TEXT + name if name.startswith("bert.") or name.startswith("cls.") else f"{TEXT}bert.{name}"] = value
    source, tensors, dropped = read_weights(renamed)
    report = LoadReport(str(path), "BERT", dropped=dropped)
    ours = {name: p for name, p in model.named_parameters() if name.startswith(TEXT)}
    for name in list(ours):
        if ".crossattention." in name:
            report.initial[name] = "BERT reads no video"
            del ours[name]
    _copy(str(path), tensors, ours, report, model.config)
    _log.info("%s", report)
    return report


@torch.no_grad()
def _copy(
    source: str, tensors: dict[str, Tensor], ours: dict[str, nn.Parameter], report: LoadReport, config: RetrievalConfig,
    before: Any = None,
) -> None:  # fmt: skip
    """Copy tensors into parameters of the same names, after `before()`. Raises CheckpointError, before that, for misfits."""
    has, due = (any(name.startswith(WORDS_HEAD) for name in names) for names in (tensors, ours))
    if has and not due:
        left = [name for name in tensors if name.startswith(WORDS_HEAD)]
        report.dropped |= dict.fromkeys(left, "the model has no head for masked words")
        tensors = {name: value for name, value in tensors.items() if not name.startswith(WORDS_HEAD)}
    if due and not has:
        absent = [name for name in ours if name.startswith(WORDS_HEAD)]
        report.initial |= dict.fromkeys(absent, "the checkpoint has no head for masked words")
        ours = {name: p for name, p in ours.items() if name not in absent}
    problems = [f"not in the checkpoint: {name}" for name in ours if name not in tensors]
    problems += [f"not in the model: {name}" for name in tensors if name not in ours]
    for name in ours.keys() & tensors.keys():
        if ours[name].shape != tensors[name].shape:
            problems.append(f"{name}: checkpoint {tuple(tensors[name].shape)}, model {tuple(ours[name].shape)}")
    if problems:
        words = tensors.get(EMBEDDINGS + "word_embeddings.weight", torch.empty(0, 0)).shape
        sizes = f"it has {words[0]} words of width {words[1]}, the model {config.vocab_size} of {config.hidden_size}"
        shown = "; ".join(sorted(problems)[:5]) + f"; and {len(problems) - 5} more" * (len(problems) > 5)
        raise CheckpointError(f"{source} does not fit this model, which is unchanged: {sizes}; {shown}")
    if before is not None:
        before()
    for name, parameter in ours.items():
        value = tensors[name]
        if value.dtype != parameter.dtype:
            report.converted[name] = f"{value.dtype} to {parameter.dtype}".replace("torch.", "")
        else:
            report.loaded.append(name)
        parameter.copy_(value)
