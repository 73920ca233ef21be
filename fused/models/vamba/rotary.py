"""Multimodal rotary positions (M-RoPE) of Qwen2-VL."""

from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fused import backends
from fused.runtime.dtypes import accumulation_dtype

Angles = tuple[Tensor, Tensor]


def rotary_angles(
    position_ids: Int[Tensor, "3 B L"], section: tuple[int, ...], theta: int | float, dtype: torch.dtype
) -> Angles:
    """Return cosine and sine (B, 1, L, head_dim / 2) in `dtype`; angles are computed in float64.

    Frequency i is theta^(-i / (head_dim/2)); the first section[0] of them turn with time, then height, then width.
    """
    frequencies, axis = _frequencies(section, theta, position_ids.device)
    angles = (position_ids[axis].movedim(0, -1) * frequencies)[:, None]
    return angles.cos().to(dtype).contiguous(), angles.sin().to(dtype).contiguous()


@cache
def _frequencies(section: tuple[int, ...], theta: int | float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the frequencies, float64 (head_dim/2,), and the axis of each."""
    half = sum(section)
    powers = torch.arange(half, dtype=torch.float64, device=device) / -half
    axis = [number for number, count in enumerate(section) for _ in range(count)]
    return torch.pow(float(theta), powers), torch.tensor(axis, device=device)


def rotate(x: Float[Tensor, "B H L C"], angles: Angles, backend: str) -> Float[Tensor, "B H L C"]:
    """Return x with the pairs of channels (c, c + C/2) rotated, computed in at least float32 and rounded once."""
    if backends.operators_of(backend) == "native":
        from fused.ops.rotary.native import rotary, takes

        if takes(x, *angles):
            return rotary(x, *angles)
    precise = accumulation_dtype(x.dtype)
    cos, sin = (t.to(precise) for t in angles)
    first, second = x.to(precise).chunk(2, dim=-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(turned, dim=-1).to(x.dtype)
