"""A classifier as an ONNX file for one shape of clips."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused.io.atomic_write import atomic_write
from fused.models.videomamba.model import VideoMamba


class OnnxExport(NamedTuple):
    """The file that `export_onnx` wrote."""

    path: Path
    shape: tuple[int, ...]  # of the clips that it takes, and no others
    nodes: int


def export_onnx(model: VideoMamba, path: str | Path, *, batch: int = 1) -> OnnxExport:
    """Write the classifier in eval mode as one ONNX file, atomically; print and return the number of its nodes.

    The graph is that of the "torch" backend, in the parameters' dtype on the CPU, unrolled for clips of the model's own shape
    (batch, C, T, H, W): input "clip", output "logits"; with distill_dim also "features". A runtime
    refuses clips of another shape. `model` is not changed.

    Raises TypeError for another model, ValueError for a wrong batch, ImportError without onnx and onnxscript, OSError if the
    file cannot be written.
    """
    if not isinstance(model, VideoMamba):
        raise TypeError(f"model must be a VideoMamba, got {type(model).__name__}")
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch is {batch!r}; allowed: a positive integer")
    try:
        import onnx  # noqa: F401
        from onnxscript import optimizer
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install onnx onnxscript") from error
    path, config = Path(path), model.config
    dtype = next(model.parameters()).dtype
    copied = copy.deepcopy(model).to("cpu", dtype)  # with adapters and hooks, if there are any
    copied.requested_backend = "torch"
    frames = () if config.num_frames is None else (config.num_frames,)
    clip = torch.zeros(batch, config.channels, *frames, *config.sides, dtype=dtype)
    names = ["logits"] if config.distill_dim is None else ["logits", "features"]
    with torch.no_grad():
        program: Any = torch.onnx.export(
            copied.eval(), (clip,), dynamo=True, input_names=["clip"], output_names=names, verbose=False,
            optimize=False,
        )  # fmt: skip
    optimizer.fold_constants(program.model)  # the optimizer's other passes take minutes for a model of full size
    optimizer.remove_unused_nodes(program.model)
    with atomic_write(path) as draft:
        program.save(draft, external_data=False)  # the largest published model has 0.4 GB, a file may have 2
    written = OnnxExport(path, tuple(clip.shape), len(program.model.graph))
    print(f"{path}: {written.nodes} nodes for clips of shape {written.shape}")
    return written
