"""Launches of the SSD scan's Triton kernels.

With decays a_t = exp(d_t A), a chunk of tokens that the state S enters gives, by matrix products,

    y_i = sum over j <= i of (C_i . B_j) a_(j+1) ... a_i d_j x_j  +  a_1 ... a_i S C_i
    S'  = a_1 ... a_Q S  +  sum over j of a_(j+1) ... a_Q d_j x_j B_j^T

Forward, four kernels: `steps` (d and the sums of log decays of every chunk), `span_state` (the state that each span of chunks
leaves, from zero), `pass` (the states that enter the spans, in order, in float32), `scan` (a span, chunk after chunk, its state
in registers). A sequence of one span needs the first and the last kernel only. No result is summed by atomics: everything is
repeatable bit by bit. In bfloat16 `span_state`, or `scan` if it alone goes through the sequence, updates a state by products of
three terms, which keep float32's precision; for y one term is enough.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fused.ops.ssd.kernels import pass_kernel, scan_kernel, span_state_kernel, steps_kernel
from fused.runtime import triton_launch
from fused.runtime.modes import is_batch_invariant
from fused.runtime.triton_launch import FUSED_MULTIPLY_ADD, NATIVE, blocks, capability, power_of_2

MAX_CHANNELS, MAX_STATES = 64, 128  # P and N; with 128 and 256 the backward reads foreign memory on an H200
MULTIPROCESSORS = 132  # of an H200; a constant, because the spans decide the order of sums
STEPS = {"BLOCK_HEADS": 16, "num_warps": 4, **FUSED_MULTIPLY_ADD}
PASS = {"BLOCK": 1024, "num_warps": 4, **FUSED_MULTIPLY_ADD}
SPAN_OVERHEAD_CHUNKS = 2  # the time of a program before and after its loop, in chunks
STATE_SHARE = 0.5  # of a chunk's time in `scan`, which `span_state` takes


class Config(NamedTuple):
    """The compile-time choices of the kernels for one set of sizes."""

    CHUNK: int
    HEADS: int
    BLOCK_P: int
    BLOCK_N: int
    COMPUTE: Any
    TERMS: int
    READ_TERMS: int
    EXACT: bool  # whether the backward keeps the states that enter the chunks
    scan_warps: int
    scan_stages: int
    state_warps: int
    state_stages: int
    gradient_warps: int
    gradient_stages: int
    TILE_N: int  # states of a tile in the kernels of the backward
    programs_per_multiprocessor: int


class Sizes(NamedTuple):
    """The sizes of a scan: clips, tokens, heads, channels of a head, groups, states."""

    clips: int
    L: int
    H: int
    P: int
    G: int
    N: int


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which these tensors are multiplied: bfloat16 if all are, in which they are exact, else float32."""
    return torch.bfloat16 if all(t.dtype == torch.bfloat16 for t in tensors) else torch.float32


def choose_config(sizes: Sizes, dtype: torch.dtype, capability: int = 0, backward: bool = False) -> Config:
    """Return the configuration for these sizes and the dtype of products, on a GPU of a compute capability (90 for 9.0)."""
    block_n = max(16, power_of_2(sizes.N))
    block_p = max(16, min(64, power_of_2(sizes.P), 128 * 64 // block_n))  # a state of at most 64 registers a thread
    if dtype != torch.bfloat16 or not NATIVE:
        chunk = 16 if not NATIVE else 32
        return Config(chunk, 1, block_p, block_n, tl.float32, 1, 1, True, 4, 1, 4, 1, 4, 1, min(64, block_n), 1)
    # Triton 3.6 fails to compile the backward of chunks of 64 for sm_100, at sums of what is in tensor memory
    chunk = 32 if backward and capability >= 100 else 64
    return Config(chunk, 1, block_p, block_n, tl.bfloat16, 3, 2, False, 4, 2, 4, 3, 4, 1, min(64, block_n), 2)


@lru_cache(maxsize=1024)
def choose_spans(programs: int, num_chunks: int, slots: int) -> tuple[int, int]:
    """Return (spans of a sequence, chunks of a span) that take the least time, with `programs` a span and `slots` at once.

    Unless it is the only one, a span is gone through twice, the first time without outputs.
    """
    best: tuple[float, int, int] = (math.inf, 1, num_chunks)
    for wanted in range(1, min(num_chunks, blocks(4 * slots, programs)) + 1):
        each = blocks(num_chunks, wanted)
        spans = blocks(num_chunks, each)
        time: float = blocks(programs * spans, slots) * (each + SPAN_OVERHEAD_CHUNKS)
        if spans > 1:
            time += blocks(programs * spans, slots) * (STATE_SHARE * each + SPAN_OVERHEAD_CHUNKS)
        best = min(best, (time, spans, each))
    return best[1:]


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    softplus: bool, low: float, high: float, initial_state: Tensor | None, seq_idx: Tensor | None, reverse: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan: return y (B, L, H, P) in x's dtype and the final state (B, H, P, N) in float32.

    Shapes are those of `fused.ssd`. Strides are free but over the last axis, where others than 1 cost a copy.
    """
    x, dt, B, C, z = (rows(t) for t in (x, dt, B, C, z))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final_shape = (x.shape[0], *x.shape[2:], B.shape[3])
    if not y.numel():
        return y, torch.empty(final_shape, dtype=torch.float32, device=x.device)
    call = prepare(x, dt, A, B, C, dt_bias, softplus, low, high, initial_state, seq_idx, reverse, config)
    config = call.config
    z_strides = (0, 0, 0) if z is None else z.stride()[:3]
    known = call.final is not None
    final = torch.empty(final_shape, dtype=torch.float32, device=x.device) if call.final is None else call.final
    options = call.options | {"TERMS": 1 if known else config.TERMS}  # y is rounded to bfloat16 anyway
    triton_launch.launch(
        scan_kernel, x.device, call.grid,
        x, B, C, D, z, call.ids, *call.steps, call.entering, y, None if known else final, *call.shape,
        *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *z_strides, *head_strides(D), **options,
        num_warps=config.scan_warps, num_stages=config.scan_stages,
    )  # fmt: skip
    return y, final


class Call(NamedTuple):
    """The configuration, sizes and tensors that the kernels of one call share."""

    config: Config
    sizes: Sizes
    shape: tuple[int, ...]  # L, H, P, N, heads a group, chunks, spans, chunks of a span: arguments of every kernel
    options: dict[str, Any]
    ids: Tensor | None
    steps: tuple[Tensor, Tensor, Tensor]  # d and the sums of log decays as two numbers, (B, H, tokens) in float32
    entering: Tensor | None  # (B, spans, H, P, N) in float32, or an initial state (B, H, P, N), or None for zeros
    final: Tensor | None  # (B, H, P, N) in float32; None if there is one span, which is not gone through yet

    @property
    def grid(self) -> tuple[int, int]:
        """Return the programs of a kernel: all spans of all heads, and the blocks of P."""
        programs = self.sizes.clips * self.shape[6] * (self.sizes.H // self.config.HEADS)
        return programs, blocks(self.sizes.P, self.config.BLOCK_P)


def prepare(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor | None, softplus: bool, low: float, high: float,
    initial_state: Tensor | None, seq_idx: Tensor | None, reverse: bool, config: Config | None = None, backward: bool = False,
) -> Call:  # fmt: skip
    """Choose the configuration and the spans, and run all kernels that come before the outputs."""
    sizes = Sizes(*x.shape, *B.shape[2:])
    clips, L, H, P, G, N = sizes
    config = config or choose_config(sizes, product_dtype(x, B, C), capability(x.device), backward)
    num_chunks = blocks(L, config.CHUNK)
    programs = (H // config.HEADS) * blocks(P, config.BLOCK_P) * (1 if is_batch_invariant() else clips)
    num_spans, chunks_per_span = choose_spans(programs, num_chunks, MULTIPROCESSORS * config.programs_per_multiprocessor)
    shape = (L, H, P, N, H // G, num_chunks, num_spans, chunks_per_span)
    options: dict[str, Any] = {
        "REVERSE": reverse, "CHUNK": config.CHUNK, "HEADS": config.HEADS, "BLOCK_P": config.BLOCK_P,
        "BLOCK_N": config.BLOCK_N, "COMPUTE": config.COMPUTE, "TERMS": config.TERMS,
        "EVEN": P % config.BLOCK_P == 0 and N == config.BLOCK_N, **FUSED_MULTIPLY_ADD,
    }  # fmt: skip
    ids = None if seq_idx is None else seq_idx.contiguous()
    steps = _steps(dt, A, dt_bias, softplus, low, high, reverse, num_chunks, config.CHUNK)
    entering = None if initial_state is None else initial_state.contiguous()
    call = Call(config, sizes, shape, options, ids, steps, entering, None)
    if num_spans > 1:
        states, decays = empty_span_states(call, x.device)
        triton_launch.launch(
            span_state_kernel, x.device, call.grid,
            x, B, ids, *steps, states, decays, *shape, *x.stride()[:3], *B.stride()[:3], **options,
            num_warps=config.state_warps, num_stages=config.state_stages,
        )  # fmt: skip
        final = torch.empty((clips, H, P, N), dtype=torch.float32, device=x.device)
        pass_states(call, states, decays, entering, final, backward=False)
        call = call._replace(entering=states, final=final)
    return call


def empty_span_states(call: Call, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return uninitialised states (B, spans, H, P, N) and decays (B, spans, H) of spans."""
    clips, spans, H, P, N = call.sizes.clips, call.shape[6], call.sizes.H, call.sizes.P, call.sizes.N
    states = torch.empty((clips, spans, H, P, N), dtype=torch.float32, device=device)
    return states, torch.empty((clips, spans, H), dtype=torch.float32, device=device)


def pass_states(
    call: Call, states: Tensor, decays: Tensor, initial: Tensor | None, final: Tensor | None, backward: bool
) -> None:
    """Replace what each span leaves by what enters it, from `initial` (B, H, P, N) on, and write the last state to `final`.

    `backward` begins at the last span.
    """
    size = call.sizes.P * call.sizes.N
    triton_launch.launch(
        pass_kernel, states.device, (call.sizes.clips * call.sizes.H, blocks(size, PASS["BLOCK"])),
        states, decays, initial, final, call.sizes.H, size, call.shape[6], BACKWARD=backward, **PASS
    )


def rows(t: Any) -> Any:
    """Return the tensor, copied if its last axis is not contiguous; None as it is."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def head_strides(D: Tensor | None) -> tuple[int, int]:
    """Return the strides of D (H,) or (H, P) over heads and channels."""
    return (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)


def _steps(
    dt: Tensor, A: Tensor, dt_bias: Tensor | None, softplus: bool, low: float, high: float, reverse: bool, num_chunks: int,
    CHUNK: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return d, and the chunks' sums of log decays as two numbers, each (B, H, num_chunks CHUNK) in float32."""
    clips, L, H = dt.shape
    d, prefix, prefix_low = torch.empty((3, clips, H, num_chunks * CHUNK), dtype=torch.float32, device=dt.device).unbind(0)
    bias = None if dt_bias is None else dt_bias.contiguous()
    triton_launch.launch(
        steps_kernel, dt.device, (clips * num_chunks, blocks(H, STEPS["BLOCK_HEADS"])),
        dt, A.contiguous(), bias, d, prefix, prefix_low, L, H, num_chunks, *dt.stride()[:2], low, high,
        SOFTPLUS=softplus, REVERSE=reverse, CHUNK=CHUNK, **STEPS,
    )  # fmt: skip
    return d, prefix, prefix_low
