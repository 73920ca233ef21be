"""A Triton kernel that does nothing but exponentials; importing it needs Triton."""

import torch
import triton
import triton.language as tl

NUMBERS, REPEATS = 2048, 2048  # numbers a block holds, and exponentials that it takes of each
WARPS = 8  # of 32 threads: eight independent chains a thread


def launch(blocks: int, out: torch.Tensor) -> None:
    """Run `blocks` blocks; `out` holds NUMBERS float32."""
    chains[(blocks,)](out, NUMBERS, REPEATS, num_warps=WARPS)


@triton.jit
def chains(out: tl.tensor, NUMBERS: tl.constexpr, REPEATS: tl.constexpr):
    """Store NUMBERS results of REPEATS exponentials each, one after the other."""
    x = tl.arange(0, NUMBERS).to(tl.float32) * -1e-6
    for _ in range(REPEATS):
        x = tl.exp2(x) - 1.0  # the subtraction goes to another unit
    tl.store(out + tl.arange(0, NUMBERS), x)
