"""Launches of the SSD scan's Triton kernels.

With decays a_t = exp(d_t A), a chunk of tokens that the state S enters gives, by matrix products,

    y_i = sum over j <= i of (C_i . B_j) a_(j+1) ... a_i d_j x_j  +  a_1 ... a_i S C_i
    S'  = a_1 ... a_Q S  +  sum over j of a_(j+1) ... a_Q d_j x_j B_j^T

Forward, three kernels: `steps` (d and the decays within chunks), `states` (from chunk to chunk, a tile of the state of a head
in registers, in float32; it stores the state that enters each chunk in the dtype of the products that read it), `scan` (y, all
chunks at once; a program takes several heads of a group, which share C and C B^T). A sequence is never cut for `states`: the
order of its sums depends on nothing but the chunk. No result is summed by atomics: everything is repeatable bit by bit. In
bfloat16 a state is updated by products of three terms, which keep float32's precision; for y one term is enough.
"""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fused.ops.ssd.kernels import scan_kernel, steps_kernel
from fused.ops.ssd.state_kernels import states_kernel
from fused.runtime import triton_launch
from fused.runtime.triton_launch import FUSED_MULTIPLY_ADD, NATIVE, blocks, capability, power_of_2

MAX_CHANNELS, MAX_STATES = 128, 256  # P and N
MULTIPROCESSORS = 132  # of an H200; a constant, because the heads of a program decide the order of sums
STEPS = {"BLOCK_HEADS": 4, "num_warps": 4, **FUSED_MULTIPLY_ADD}


class Options(NamedTuple):
    """How the compiler builds a kernel."""

    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, Any]:
        """Return them as Triton takes them."""
        # STAGES are the stages of a loop: without it Triton fetches ahead only what products are taken of
        stages = {"num_stages": self.num_stages, "STAGES": self.num_stages}
        return {"num_warps": self.num_warps, **stages, **FUSED_MULTIPLY_ADD}


class Config(NamedTuple):
    """The compile-time choices of the kernels for one set of sizes."""

    CHUNK: int
    BLOCK_P: int
    BLOCK_N: int
    STATE_P: int  # the tile of the state that a program of `states` has
    STATE_N: int
    COMPUTE: Any
    TERMS: int
    EXACT: bool
    heads: int  # of a program, at most
    states: Options
    scan: Options
    state_gradient: Options = Options(4, 2)
    pairs: Options = Options(4, 2)
    input_gradient: Options = Options(4, 2)
    diagonal: bool = True  # whether <state, gradient> is the diagonal of a product of matrices


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
    # Triton 3.6 fails to compile for sm_100 where sums are taken of a product of 64 rows, which is in tensor memory
    tensor_memory = capability >= 100
    if dtype != torch.bfloat16 or not NATIVE:
        chunk, one = 16 if not NATIVE else 32, Options(4, 1)
        block_n, block_p = max(16, min(128, power_of_2(sizes.N))), max(16, min(64, power_of_2(sizes.P)))
        tile = min(block_p, 32), min(block_n, 64)
        config = Config(chunk, block_p, block_n, *tile, tl.float32, 1, True, 8, one, one, one, one, one)
    else:
        # on an H200, Triton 3.6 built kernels that were wrong for blocks of 32 channels: there are none below 64
        block_p, block_n = 64, 64 if sizes.N <= 64 else 128
        if not backward and sizes.N <= 128:
            chunk, over_heads = 128, Options(8, 3 if capability >= 90 else 2)  # with a gate, 3 are too many for an A100
        else:
            chunk, over_heads = 32 if tensor_memory and backward else 64, Options(4, 3 if sizes.N <= 128 else 2)
        state_n = block_n if backward else 64
        config = Config(
            chunk, block_p, block_n, block_p, state_n, tl.bfloat16, 3, False, 16, Options(4, 3), *(over_heads,) * 4
        )
    if 0 < capability < 90:  # without warpgroups a product takes more registers
        eight = Options(8, 1 if config.EXACT else 2)
        config = config._replace(STATE_N=min(config.STATE_N, 64), state_gradient=eight, input_gradient=eight, diagonal=False)
        if not config.EXACT:
            config = config._replace(states=Options(4, 2))
        else:
            config = config._replace(BLOCK_N=min(config.BLOCK_N, 64), scan=eight, pairs=eight)
    return config._replace(diagonal=config.diagonal and not tensor_memory)


def choose_heads(sizes: Sizes, num_chunks: int, most: int, batch_invariant: bool) -> int:
    """Return the heads of a program: as many as leave two programs for every multiprocessor, at most `most`.

    With `batch_invariant` they do not depend on the number of clips.
    """
    per_group, heads = sizes.H // sizes.G, 1
    clips = 1 if batch_invariant else sizes.clips
    while heads < min(most, per_group):
        if clips * num_chunks * sizes.G * blocks(per_group, 2 * heads) < 2 * MULTIPROCESSORS:
            break
        heads *= 2
    return min(heads, per_group)


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    softplus: bool, low: float, high: float, initial_state: Tensor | None, seq_idx: Tensor | None, reverse: bool,
    want_final: bool = True, config: Config | None = None, batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan: return y (B, L, H, P) in x's dtype and the final state (B, H, P, N) in float32, empty unless wanted.

    Shapes are those of `fused.ssd`. Strides are free but over the last axis, where others than 1 cost a copy. Without tokens
    the state is the initial one.
    """
    x, dt, B, C, z, D = (rows(t) for t in (x, dt, B, C, z, D))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    state = x.shape[0], *x.shape[2:], B.shape[3]
    final = torch.empty(state if want_final else 0, dtype=torch.float32, device=x.device)
    if not y.numel():
        return y, final.zero_() if initial_state is None or not want_final else final.copy_(initial_state)
    call = prepare(x, dt, A, B, C, dt_bias, softplus, low, high, seq_idx, reverse, config, batch_invariant)
    config, steps = call.config, call.steps
    entering, initial = new_states(call, x), None if initial_state is None else initial_state.contiguous()
    triton_launch.launch(
        states_kernel, x.device, call.states_grid,
        x, B, None, steps.into, steps.decay, initial, entering, final if want_final else None,
        *call.shape, *x.stride()[:3], *B.stride()[:3], TERMS=config.TERMS if want_final else 1, **call.states_options,
    )  # fmt: skip
    z_strides = (0, 0, 0) if z is None else z.stride()[:3]
    triton_launch.launch(
        scan_kernel, x.device, call.grid,
        x, B, C, None if D is None else D.contiguous(), z, call.ids, steps.d, steps.prefix, steps.prefix_low,
        steps.from_state, steps.column, entering, y, *call.shape, call.heads,
        *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *z_strides, TILES=blocks(call.sizes.N, config.BLOCK_N),
        D_CHANNELS=D is not None and D.dim() == 2, **call.options, **config.scan.launch(),
    )  # fmt: skip
    return y, final


class Steps(NamedTuple):
    """Tensors of dt and A alone: by token (B, H, chunks CHUNK), and `decay` by chunk (B, H, chunks); see `steps_kernel`."""

    d: Any
    prefix: Tensor
    prefix_low: Tensor | None
    from_state: Tensor
    to_end: Any
    into: Any
    column: Tensor | None
    decay: Tensor


class Call(NamedTuple):
    """The configuration, sizes and tensors that the kernels of one call share."""

    config: Config
    sizes: Sizes
    num_chunks: int
    heads: int  # of a program
    options: dict[str, Any]
    ids: Tensor | None
    steps: Steps
    reverse: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the sizes that the kernels take: L, H, P, N, heads of a group, chunks."""
        return (*self.sizes[1:4], self.sizes.N, self.sizes.H // self.sizes.G, self.num_chunks)

    @property
    def head_blocks(self) -> int:
        """Return the programs among which the heads of a group are divided."""
        return blocks(self.sizes.H // self.sizes.G, self.heads)

    @property
    def states_grid(self) -> tuple[int, int, int]:
        """Return the programs that go through sequences: all heads of all clips; the tiles of P; those of N."""
        clips, _, H, P, _, N = self.sizes
        return clips * H, blocks(P, self.config.STATE_P), blocks(N, self.config.STATE_N)

    @property
    def states_options(self) -> dict[str, Any]:
        """Return their constants and options."""
        config, (P, N) = self.config, (self.sizes.P, self.sizes.N)
        even = P % config.STATE_P == 0 and N % config.STATE_N == 0
        tile = {"BLOCK_P": config.STATE_P, "BLOCK_N": config.STATE_N, "EVEN": even}
        return self.options | tile | config.states.launch()

    @property
    def grid(self) -> tuple[int, int]:
        """Return the programs of a kernel: all chunks of all clips, groups and blocks of heads; and the blocks of P."""
        programs = self.sizes.clips * self.num_chunks * self.sizes.G * self.head_blocks
        return programs, blocks(self.sizes.P, self.config.BLOCK_P)


def prepare(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor | None, softplus: bool, low: float, high: float,
    seq_idx: Tensor | None, reverse: bool, config: Config | None, batch_invariant: bool, backward: bool = False,
) -> Call:  # fmt: skip
    """Choose the configuration and run `steps`."""
    sizes = Sizes(*x.shape, *B.shape[2:])
    config = config or choose_config(sizes, product_dtype(x, B, C), capability(x.device), backward)
    num_chunks = blocks(sizes.L, config.CHUNK)
    options: dict[str, Any] = {
        "REVERSE": reverse, "CHUNK": config.CHUNK, "BLOCK_P": config.BLOCK_P, "BLOCK_N": config.BLOCK_N,
        "COMPUTE": config.COMPUTE, "EVEN": sizes.P % config.BLOCK_P == 0 and sizes.N % config.BLOCK_N == 0,
    }  # fmt: skip
    ids = None if seq_idx is None else seq_idx.contiguous()
    steps = _steps(dt, A, dt_bias, softplus, low, high, ids, reverse, num_chunks, config, backward)
    heads = choose_heads(sizes, num_chunks, config.heads, batch_invariant)
    return Call(config, sizes, num_chunks, heads, options, ids, steps, reverse)


def new_states(call: Call, x: Tensor) -> Tensor:
    """Return an empty tensor for a state for every chunk, (B, chunks, H, P, N)."""
    clips, _, H, P, _, N = call.sizes
    dtype = torch.bfloat16 if call.config.COMPUTE == tl.bfloat16 else torch.float32
    return torch.empty((clips, call.num_chunks, H, P, N), dtype=dtype, device=x.device)


def rows(t: Any) -> Any:
    """Return the tensor, copied if its last axis is not contiguous; None as it is."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _steps(
    dt: Tensor, A: Tensor, dt_bias: Tensor | None, softplus: bool, low: float, high: float, ids: Tensor | None, reverse: bool,
    num_chunks: int, config: Config, backward: bool,
) -> Steps:  # fmt: skip
    clips, L, H = dt.shape
    float32 = config.COMPUTE == tl.float32
    wanted = (backward or float32, True, float32, True, backward, not backward, not (backward or float32))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=dt.device)

    tensors = iter(empty(sum(wanted), clips, H, num_chunks * config.CHUNK).unbind(0))
    by_token: list[Any] = [next(tensors) if want else None for want in wanted]
    steps = Steps(*(*by_token, empty(clips, H, num_chunks)))
    bias = None if dt_bias is None else dt_bias.contiguous()
    triton_launch.launch(
        steps_kernel, dt.device, (clips * num_chunks, blocks(H, STEPS["BLOCK_HEADS"])),
        dt, A.contiguous(), bias, ids, *steps, L, H, num_chunks, *dt.stride()[:2], low, high,
        SOFTPLUS=softplus, REVERSE=reverse, CHUNK=config.CHUNK, **STEPS,
    )  # fmt: skip
    return steps
