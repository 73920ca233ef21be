"""RMSNorm of two tensors' rows, written as one sequence of both: no copy of the normalised rows is made to interleave them."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from fused.ops.add_norm.launch import tile_of_rows
from fused.runtime.triton_launch import blocks, launch


@triton.jit(do_not_specialize=["M", "length", "num_tokens", "num_queries"])
def interleaved_norm_kernel(
    tokens_ptr: tl.tensor, queries_ptr: tl.tensor, sources_ptr: tl.tensor, weight_ptr: tl.tensor, y_ptr: tl.tensor,
    M: tl.tensor, D: tl.tensor, length: tl.tensor, num_tokens: tl.tensor, num_queries: tl.tensor, eps: tl.tensor,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute y (M, D) of tokens (clips, num_tokens, D) and queries (clips, num_queries, D), M = clips * length."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    clips = (rows // length).to(tl.int64)
    source = tl.load(sources_ptr + rows % length, mask=rows < M, other=0)
    is_token = (source >= 0)[:, None]
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    token = tokens_ptr + (clips * num_tokens + source)[:, None] * D + columns[None, :]
    query = queries_ptr + (clips * num_queries - 1 - source)[:, None] * D + columns[None, :]
    of_tokens = tl.load(token, mask=inside & is_token, other=0.0, eviction_policy="evict_first").to(tl.float32)
    of_queries = tl.load(query, mask=inside & (source < 0)[:, None], other=0.0).to(tl.float32)
    v = tl.where(is_token, of_tokens, of_queries)
    rstd = tl.rsqrt(tl.sum(v * v, axis=1) / D + eps)
    y = v * rstd[:, None] * tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


def interleaved_norm(
    tokens: Float[Tensor, "B T D"], queries: Float[Tensor, "B Q D"], sources: Int[Tensor, " N"], weight: Float[Tensor, " D"],
    eps: float,
) -> Float[Tensor, "B N D"]:  # fmt: skip
    """Return the RMSNorm of tokens and queries, of one dtype, as a sequence (B, N, D) in that dtype, N = T + Q.

    `sources` (N,), int32, has for each place the number of its token, or -1 minus the number of its query. The rows have the
    bits of `add_norm` on backend "native", whose checks the caller makes. Nothing here has gradients or is traced.
    """
    tokens, queries = tokens.contiguous(), queries.contiguous()
    (B, T, D), Q = tokens.shape, queries.shape[1]
    y = torch.empty((B, T + Q, D), dtype=tokens.dtype, device=tokens.device)
    config = tile_of_rows(D, 64 // tokens.element_size(), 4)
    launch(
        interleaved_norm_kernel, tokens.device, (blocks(B * (T + Q), config["BLOCK_ROWS"]),),
        tokens, queries, sources, weight.contiguous(), y, B * (T + Q), D, T + Q, T, Q, eps, **config,
    )  # fmt: skip
    return y
