"""Multimodal rotary positions (M-RoPE) of Qwen2-VL: channels of a head are rotated by time, height or width."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reference.ops.dtypes import accumulation_dtype


def rotary_angles(
    position_ids: Int[Tensor, "3 B L"], section: tuple[int, ...], theta: int | float
) -> tuple[Float[Tensor, "B L C"], Float[Tensor, "B L C"]]:
    """Return cosine and sine, float64 (B, L, head_dim), for the positions of each token on the axes time, height and width.

    Frequency i is theta^(-i / (head_dim/2)). The first section[0] frequencies turn with time, the next section[1] with height,
    the last section[2] with width. Channels c and c + head_dim/2 form a pair and have the same angle.
    """
    half = sum(section)
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64, device=position_ids.device) / half)
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(section)).to(position_ids.device)
    angles = position_ids[axis].movedim(0, -1) * frequencies  # (B, L, half)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "B H L C"], angles: tuple[Tensor, Tensor]) -> Float[Tensor, "B H L C"]:
    """Return x with each pair of channels (c, c + C/2) rotated by its angle; computed in at least float32, in x's dtype."""
    precise = accumulation_dtype(x.dtype)
    cos, sin = (t[:, None].to(precise) for t in angles)
    first, second = x.to(precise).chunk(2, dim=-1)
    return (torch.cat((first, second), -1) * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
