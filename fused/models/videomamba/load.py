"""Loading published weights: layouts, names, positions and patches for other sizes, and a report on every tensor."""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused.io.checkpoint_file import CheckpointError, read_checkpoint
from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.layouts import plain_name, unwrap
from fused.models.videomamba.resize import inflate_kernel, resize_frames, resize_grid
from fused.models.videomamba.weight_forms import check_forms
from fused.rules import abbreviate, invalid, is_integer

# parts that some kinds of VideoMamba have and others lack; a missing one is reported as such
OPTIONAL_PARTS = ("head.", "clip_decoder.", "pool_norm.", "distill_head.")

_log = logging.getLogger("fused")


@dataclass
class LoadReport:
    """The report on every tensor of a checkpoint and of a model; prints as a summary."""

    source: str
    layout: str  # the containers and prefixes that were stripped
    loaded: list[str] = field(default_factory=list)  # unchanged, bit for bit
    converted: dict[str, str] = field(default_factory=dict)  # name in the model -> changes
    initial: dict[str, str] = field(default_factory=dict)  # parameters that keep their initial values -> reason
    dropped: dict[str, str] = field(default_factory=dict)  # entries of the checkpoint that were not used -> reason

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.layout}): {len(self.loaded)} tensors loaded as they were"]
        for title, entries in (("converted", self.converted), ("left at init", self.initial), ("dropped", self.dropped)):
            reasons: dict[str, list[str]] = {}
            for name, reason in entries.items():
                reasons.setdefault(reason, []).append(name)
            lines += [f"  {title}: {abbreviate(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join(lines)


def load_checkpoint(
    model: nn.Module,
    path_or_state_dict: str | Path | Mapping[str, Any],
    *,
    which: str = "model",
    strict: bool = True,
    inflate: str = "centre",
    grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Load weights of any layout that `layouts` describes into a `VideoMamba` or `VideoMambaEncoder`, and return the report.

    `path_or_state_dict` is a file, or the content of one. A file is read onto the CPU without running code in it
    (`fused.read_checkpoint`). `which` selects the "model"'s weights, or the moving average of them ("ema"), which upstream and
    timm save beside these. Converted where the model differs: dtypes; `norm` and `norm_f`; the patches of an image model for
    clips (`inflate`: "centre" or "mean", see `resize.inflate_kernel`); positions, bicubic in space and linear in time. `grid`
    is the checkpoint's (rows, columns) of patches: by default the model's if the numbers of patches are equal, else a square. A
    head for other classes, and whole parts that only one of both has (`OPTIONAL_PARTS`, the temporal positions of an image
    model, other networks, an optimiser) are left out and reported.

    Anything else that is missing, left over or of another shape raises CheckpointError if `strict`, and is reported if not.
    The report is logged too, as a warning if something was left at init. After an error the model is unchanged.

    Raises FileNotFoundError, CheckpointError (a RuntimeError), also for quantised weights and for a model without memory;
    ValueError for `which`, `inflate` or `grid`; TypeError for another model, and unless the weights are a path or a mapping.

        >>> model = VideoMamba(VideoMambaConfig.tiny(num_frames=16, img_size=288))
        >>> print(load_checkpoint(model, "videomamba_t16_k400_f8_res224.pth"))
    """
    config = _config(model)
    _check_arguments(path_or_state_dict, grid)
    source, content = "state_dict", path_or_state_dict
    if not isinstance(content, Mapping):
        source, content = str(content), read_checkpoint(content)
    try:
        weights = unwrap(content, which)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    report = LoadReport(source, weights.layout, dropped=dict(weights.dropped))
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    tensors, changes = _rename_norm(weights.tensors, parameters)
    check_forms(source, tensors, parameters)
    image = "patch_embed.proj.weight" in tensors and tensors["patch_embed.proj.weight"].dim() == 4
    _leave_out(tensors, parameters, image, report)

    fitting, misfits = {}, []
    for name in tensors.keys() & parameters.keys():
        value, done = _convert(name, tensors[name], config, inflate, grid)
        changes[name] = [*changes.get(name, []), *done]
        if value.shape == parameters[name].shape:
            fitting[name] = value
        else:
            shapes = f"checkpoint {tuple(tensors[name].shape)}, model {tuple(parameters[name].shape)}"
            misfits.append((name, shapes))
    missing = [name for name in parameters if name not in tensors and name not in report.initial]
    unexpected = [name for name in tensors if name not in parameters]
    if not any(name.startswith("layers.") for name in fitting) or (strict and (misfits or missing or unexpected)):
        _refuse(source, tensors, config, sorted(misfits), missing, unexpected)
    report.initial |= {name: "of another shape: " + shapes for name, shapes in misfits} | dict.fromkeys(missing, "not there")
    report.dropped |= {name: "of another shape: " + shapes for name, shapes in misfits} | dict.fromkeys(unexpected, "unknown")
    _copy(fitting, parameters, changes, report)
    _log.log(logging.WARNING if report.initial else logging.INFO, "%s", report)
    return report


def _config(model: Any) -> VideoMambaConfig:
    """Return the model's configuration; raise TypeError for another model, CheckpointError for one on the meta device."""
    config = getattr(model, "config", None)
    if not isinstance(config, VideoMambaConfig):
        inner = getattr(getattr(model, "module", None), "config", None)
        hint = "; pass its .module" * isinstance(inner, VideoMambaConfig)
        raise TypeError(f"model must be a VideoMamba or VideoMambaEncoder, got {type(model).__name__}{hint}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CheckpointError("model is on the meta device, without memory for weights; call model.to_empty(device=...) first")
    return config


def _check_arguments(given: object, grid: object) -> None:
    """Raise TypeError unless `given` is a path or a mapping, ValueError unless `grid` is a pair of integers or None."""
    if not isinstance(given, str | os.PathLike | Mapping):
        of_model = "; of a model pass its weights: load_checkpoint(model, other_model.state_dict())"
        raise TypeError(
            f"path_or_state_dict is a {type(given).__name__}; allowed: the path of a file, or a state_dict"
            + of_model * isinstance(given, nn.Module)
        )
    if grid is not None and not (isinstance(grid, tuple | list) and len(grid) == 2 and all(is_integer(n, 1) for n in grid)):
        raise invalid("grid", grid, "(rows, columns) of patches, or None")


def _rename_norm(
    tensors: dict[str, Tensor], parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Return the tensors with the final norm under the model's name, and the changes by name.

    The encoder's name for it is `norm`, the classifier's `norm_f`.
    """
    renamed, changes = {}, {}
    ours, theirs = ("norm_f.", "norm.") if "norm_f.weight" in parameters else ("norm.", "norm_f.")
    swap = not any(name.startswith(ours) for name in tensors)
    for name, value in tensors.items():
        if swap and name.startswith(theirs):
            changes[ours + name.removeprefix(theirs)] = [f"renamed from {theirs}*"]
            name = ours + name.removeprefix(theirs)
        renamed[name] = value
    return renamed, changes


def _leave_out(tensors: dict[str, Tensor], parameters: Mapping[str, Tensor], image: bool, report: LoadReport) -> None:
    """Remove from `tensors` the parts that differ between kinds of VideoMamba by design, and report them."""
    for part in OPTIONAL_PARTS:
        ours, theirs = ([name for name in names if name.startswith(part)] for names in (parameters, tensors))
        if part == "head." and ours and set(ours) == set(theirs):
            rows = len(tensors[ours[0]]), len(parameters[ours[0]])
            if rows[0] != rows[1]:
                reason = f"the checkpoint's head has {rows[0]} classes, the model's {rows[1]}"
                report.initial |= dict.fromkeys(ours, reason)
                report.dropped |= {name: reason for name in theirs if tensors.pop(name) is not None}
        elif ours and not theirs:
            report.initial |= dict.fromkeys(ours, f"the checkpoint has no {part[:-1]}")
        elif theirs and not ours:
            report.dropped |= {name: f"the model has no {part[:-1]}" for name in theirs if tensors.pop(name) is not None}
    name = "temporal_pos_embedding"
    if name in parameters and name not in tensors and image:
        report.initial[name] = "the checkpoint is of an image model"
    if name in tensors and name not in parameters:
        del tensors[name]
        report.dropped[name] = "the model is an image model"


def _convert(
    name: str, value: Tensor, config: VideoMambaConfig, inflate: str, grid: tuple[int, int] | None
) -> tuple[Tensor, list[str]]:
    """Return the tensor for the model's sizes, and the changes in words."""
    if name == "patch_embed.proj.weight" and value.dim() == 4 and config.num_frames is not None:
        done = f"inflated to {config.kernel_size} frame(s), {inflate}"
        return inflate_kernel(value, config.kernel_size, inflate), [done]
    if name == "pos_embed" and value.dim() == 3:
        count = value.shape[1] - 1
        before = grid or (config.grid if count == config.patches else _square(count))
        if before is None:
            raise CheckpointError(f"pos_embed has {count} patches, no square; pass the checkpoint's grid=(rows, columns)")
        if before != config.grid:
            return resize_grid(value, before, config.grid), ["{}x{} to {}x{} patches, bicubic".format(*before, *config.grid)]
    if name == "temporal_pos_embedding" and value.dim() == 3 and value.shape[1] != config.tubelets:
        return resize_frames(value, config.tubelets), [f"{value.shape[1]} to {config.tubelets} time steps, linear"]
    return value, []


def _square(count: int) -> tuple[int, int] | None:
    """Return the square grid of `count` patches, None if there is none."""
    side = round(count**0.5)
    return (side, side) if side * side == count else None


@torch.no_grad()
def _copy(
    fitting: dict[str, Tensor], parameters: Mapping[str, Tensor], changes: dict[str, list[str]], report: LoadReport
) -> None:
    """Copy the fitting tensors into the parameters, and report them as converted or loaded."""
    for name, parameter in parameters.items():
        if name not in fitting:
            continue
        value, done = fitting[name], changes.get(name, [])
        if value.dtype != parameter.dtype:
            done = [*done, f"{value.dtype} to {parameter.dtype}".replace("torch.", "")]
        parameter.copy_(value)
        if done:
            report.converted[name] = ", ".join(done)
        else:
            report.loaded.append(name)


def _refuse(
    source: str, tensors: dict[str, Tensor], config: VideoMambaConfig,
    misfits: list[tuple[str, str]], missing: list[str], unexpected: list[str],
) -> None:  # fmt: skip
    """Raise CheckpointError with the first names of each kind, and with width and depth if these differ from the model's."""
    lines = [f"{source} does not fit this model; it is unchanged."]
    width = tensors["cls_token"].shape[-1] if "cls_token" in tensors else None
    layers = {int(found[1]) for name in tensors if (found := re.match(r"layers\.(\d+)\.", name))}
    if not layers:
        prefix = os.path.commonprefix(list(tensors)).rpartition(".")[0]
        begin = repr(prefix + ".") if prefix else abbreviate(sorted({repr(name.partition(".")[0]) for name in tensors}))
        lines.append(f"  all its names begin with {begin}; a VideoMamba's with 'cls_token', 'patch_embed.', 'layers.', ...")
    elif (width, len(layers)) != (config.embed_dim, config.depth):
        lines.append(f"  it has embed_dim {width} and depth {len(layers)}, the model {config.embed_dim} and {config.depth}")
    for title, entries in (
        ("of another shape", [f"{name} ({shapes})" for name, shapes in misfits]),
        ("not in the checkpoint", missing),
        ("not in the model", [f"{name} {tuple(tensors[name].shape)}" for name in unexpected]),
    ):
        if entries:
            lines.append(f"  {title}: {abbreviate(entries)}")
    raise CheckpointError("\n".join(lines))
