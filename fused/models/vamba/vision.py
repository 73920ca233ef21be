"""Qwen2-VL's vision tower, of the library transformers: frames to merged vision tokens.

A tower is made from a `Qwen2VLVisionConfig`, and reads pairs of frames whose sides are multiples of 28 pixels. Rows of pixels
are ordered so that the four patches that are merged are neighbours.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
STD = (0.26862954, 0.26130258, 0.27577711)
PATCH, MERGE = 14, 2
SIDE = PATCH * MERGE  # pixels of a merged token's side
PAIRS_AT_ONCE = 16  # pairs of frames that pass the tower together
VIDEO_START = "<|vision_start|>"
VIDEO_WORDS = f"{VIDEO_START}<|vision_end|>"  # stand where the video is among the text, which holds no place for its tokens


def vision_tower(config: Mapping[str, Any], *, weights: bool = True) -> nn.Module:
    """Return the tower for a `vision_config`, with initial weights; without `weights` parameters are on the meta device.

    Raises ImportError without transformers.
    """
    library = import_tower()
    known = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version", "torch_dtype")}

    def make(**changed: Any) -> nn.Module:
        described = library.configuration.Qwen2VLVisionConfig(**known | changed)
        return library.modeling.Qwen2VisionTransformerPretrainedModel(described)

    if weights:
        return make()
    with torch.device("meta"):
        tower = make()
    for name, buffer in make(depth=1).named_buffers():  # which are the same at any depth
        place, _, leaf = name.rpartition(".")
        tower.get_submodule(place)._buffers[leaf] = buffer
    return tower


class _Library:
    """The two modules of transformers that hold the tower."""

    def __init__(self, modeling: ModuleType, configuration: ModuleType) -> None:
        self.modeling, self.configuration = modeling, configuration


def import_tower() -> _Library:
    """Return transformers' modules of the tower; raise ImportError with the command that installs it."""
    try:
        from transformers.models.qwen2_vl import configuration_qwen2_vl, modeling_qwen2_vl
    except ImportError as error:
        raise ImportError("a vision tower needs transformers: pip install 'videomamba-bench[teachers]'") from error
    return _Library(modeling_qwen2_vl, configuration_qwen2_vl)


def frame_size(height: int, width: int, longest: int | None = None, shortest: int = 256) -> tuple[int, int]:
    """Return (height, width) in pixels of a frame for the tower: multiples of 28, as upstream's evaluation takes them.

    A frame with a side above `longest` is first scaled to it, then each side is raised to `shortest` at least.
    """
    if longest is not None and max(height, width) > longest:
        scale = longest / max(height, width)
        height, width = round(height * scale), round(width * scale)
    height, width = max(height, shortest), max(width, shortest)
    down, across = (max(SIDE, round(side / SIDE) * SIDE) for side in (height, width))
    return down, across


def prepare_frame(frame: UInt8[Tensor, "H W 3"], size: tuple[int, int]) -> UInt8[Tensor, "3 h w"]:
    """Return a frame resized, bicubic with antialiasing, to `size` = (height, width)."""
    image = frame.permute(2, 0, 1)[None].float()
    if image.shape[-2:] != size:
        image = F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)
    return image[0].round().clamp(0, 255).to(torch.uint8)


def frame_features(tower: nn.Module, frames: Tensor) -> Float[Tensor, "n D"]:
    """Return the merged tokens, T/2 H/28 W/28 of them in the order of time, rows and columns, of T frames (T, 3, H, W).

    `frames` are bytes, or floats from 0 to 1. Raises ValueError for an odd number of frames, and for other shapes and sides.
    """
    if frames.dim() != 4 or frames.shape[1] != 3 or len(frames) % 2 or any(side % SIDE for side in frames.shape[2:]):
        allowed = f"(T, 3, H, W), T even, H and W multiples of {SIDE}"
        raise ValueError(f"frames have shape {tuple(frames.shape)}; allowed: {allowed}")
    weight = next(tower.parameters())
    found = []
    for part in frames.split(2 * PAIRS_AT_ONCE):
        rows, grid = pixel_rows(part.to(weight.device))
        out = tower(rows.to(weight.dtype), grid_thw=grid)
        found.append(getattr(out, "pooler_output", out))
    return torch.cat(found)


def pixel_rows(frames: Tensor) -> tuple[Float[Tensor, "rows 1176"], Tensor]:
    """Return the tower's rows of pixels, float32, and the grid [[pairs, H/14, W/14]] of frames (T, 3, H, W).

    A row is (channel, frame of the pair, y, x) of a patch; rows are ordered (pair, h/2, w/2, 2, 2).
    """
    T, _, H, W = frames.shape
    pixels = frames.float() / 255 if frames.dtype == torch.uint8 else frames.float()
    mean, std = (torch.tensor(c, device=frames.device).view(3, 1, 1) for c in (MEAN, STD))
    pixels = (pixels - mean) / std
    h, w = H // PATCH, W // PATCH
    grid = pixels.view(T // 2, 2, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    rows = grid.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(T // 2 * h * w, -1)
    return rows, torch.tensor([[T // 2, h, w]], device=frames.device)
