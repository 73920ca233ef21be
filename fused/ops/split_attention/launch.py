"""Launches of the split attention: ranges of keys, then their join."""

import math
from typing import Any

import torch
from torch import Tensor

from fused.ops.split_attention.kernels import join_kernel, split_kernel
from fused.runtime import triton_launch
from fused.runtime.triton_launch import FUSED_MULTIPLY_ADD, NATIVE, blocks, power_of_2

BLOCK_M = 64  # keys that a program holds at once in 16 bits
OPTIONS: dict[bool, dict[str, Any]] = {  # by whether it is float32, which takes twice the memory and no tensor cores
    False: {"BLOCK_M": BLOCK_M, "num_warps": 4, "num_stages": 3, **FUSED_MULTIPLY_ADD},
    True: {"BLOCK_M": BLOCK_M // 4, "num_warps": 4, "num_stages": 2, **FUSED_MULTIPLY_ADD},
}
MAX_SPLITS = 128  # with 4 heads of keys about 4 programs for each of an H200's 132 multiprocessors
MAX_ROWS = 64


def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the attention (B, G, R, C) of q (B, G, R, C) to k and v (B, G, M, C), whose channels lie side by side."""
    B, G, R, C = q.shape
    M = k.shape[2]
    q, out = q.contiguous(), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    keys = BLOCK_M * blocks(blocks(M, MAX_SPLITS), BLOCK_M)
    splits = blocks(M, keys)
    part = torch.empty((B, G, splits, R, C), dtype=torch.float32, device=q.device)
    log = torch.empty((B, G, splits, R), dtype=torch.float32, device=q.device)
    block_c = max(16, power_of_2(C))
    triton_launch.launch(
        split_kernel, q.device, (splits, B * G),
        q, k, v, part, log, M, G, R, C, keys, math.log2(math.e) / math.sqrt(C), *k.stride()[:3], *v.stride()[:3],
        BLOCK_R=max(16, power_of_2(R)), BLOCK_C=block_c, WIDEN=not NATIVE, **OPTIONS[q.dtype == torch.float32],
    )  # fmt: skip
    triton_launch.launch(
        join_kernel, q.device, (B * G, R),
        part, log, out, splits, R, C,
        BLOCK_S=power_of_2(splits), BLOCK_C=block_c, num_warps=4, **FUSED_MULTIPLY_ADD,
    )  # fmt: skip
    return out
