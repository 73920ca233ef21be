"""A classifier as an ONNX file for clips of one shape, or of one shape in batches of any size."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused.io.atomic_write import atomic_write
from fused.models.videomamba.model import VideoMamba


class OnnxExport(NamedTuple):
    """The file that `export_onnx` wrote."""

    path: Path
    shape: tuple[int | str, ...]  # of the clips that it takes, and no others; "batch" stands for any number from 1 up
    nodes: int


def export_onnx(model: VideoMamba, path: str | Path, *, batch: int = 1, dynamic_batch: bool = False) -> OnnxExport:
    """Write the classifier in eval mode as one ONNX file, atomically; print and return the number of its nodes.

    The graph is that of the "torch" backend, in the parameters' dtype on the CPU, unrolled for clips of the model's own shape
    (batch, C, T, H, W): input "clip", output "logits"; with distill_dim also "features". A runtime refuses clips of another
    shape; with `dynamic_batch` it takes any number of them. `model` is not changed.

    Raises TypeError for another model, ValueError for a wrong batch, ImportError without onnx and onnxscript, OSError if the
    file cannot be written, RuntimeError if this PyTorch cannot leave the batch open.
    """
    if not isinstance(model, VideoMamba):
        raise TypeError(f"model must be a VideoMamba, got {type(model).__name__}")
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch is {batch!r}; allowed: a positive integer")
    if dynamic_batch and batch != 1:
        raise ValueError(f"batch is {batch!r}; with dynamic_batch the file has no batch of its own: leave it out")
    try:
        import onnx  # noqa: F401
        from onnxscript import optimizer
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'videomamba-bench[onnx]'") from error
    path, config = Path(path), model.config
    dtype = next(model.parameters()).dtype
    copied = copy.deepcopy(model).to("cpu", dtype)  # with adapters and hooks, if there are any
    copied.requested_backend = "torch"
    frames = () if config.num_frames is None else (config.num_frames,)
    # an export takes a size of 1 for a constant, so a batch that stays open is traced with 2 clips
    clip = torch.zeros(2 if dynamic_batch else batch, config.channels, *frames, *config.sides, dtype=dtype)
    names = ["logits"] if config.distill_dim is None else ["logits", "features"]
    shapes = {"clip": {0: torch.export.Dim("batch", min=1)}} if dynamic_batch else None
    with torch.no_grad():
        program: Any = torch.onnx.export(
            copied.eval(), (clip,), dynamo=True, input_names=["clip"], output_names=names, verbose=False,
            optimize=False, dynamic_shapes=shapes,
        )  # fmt: skip
    if dynamic_batch and isinstance(program.model.graph.inputs[0].shape[0], int):
        raise RuntimeError(f"PyTorch {torch.__version__} fixed the batch of this model in its export; pass batch instead")
    optimizer.fold_constants(program.model)  # the optimizer's other passes take minutes for a model of full size
    optimizer.remove_unused_nodes(program.model)
    with atomic_write(path) as draft:
        program.save(draft, external_data=False)  # the largest published model has 0.4 GB, a file may have 2
    written = OnnxExport(path, ("batch" if dynamic_batch else batch, *clip.shape[1:]), len(program.model.graph))
    print(f"{path}: {written.nodes} nodes for clips of shape {written.shape}")
    return written
