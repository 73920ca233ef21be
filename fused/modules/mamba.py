"""The Mamba mixer: in_proj, a scan over the same tokens from either end, one gate, out_proj."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fused import backends
from fused.backends import CPU, NATIVE, TORCH, Abilities
from fused.modules.state import State, check_mixer_state, linear_dtype, zero_state
from fused.modules.wrapped import modules_to_call, note_slow_path, weight_of
from fused.ops import mamba_ssm
from fused.ops.mamba_inner.cpu import mamba_inner_cpu, takes
from fused.ops.mamba_inner.eager import both_directions_eager, one_direction_eager
from fused.ops.shapes import DirectionWeights, Linear
from fused.runtime.autocast import autocast_dtype
from fused.runtime.cpu_library import DTYPES as CPU_DTYPES
from fused.runtime.dtypes import KERNEL_DTYPES, accumulation_dtype
from fused.runtime.linear import linear

BACKENDS = {
    "native": NATIVE,
    "cpu": CPU,
    "mamba_ssm": Abilities(False, False, True, False, KERNEL_DTYPES, ("cuda",)),
    "torch": replace(TORCH, fullgraph=False),  # as its scan
}
"""Abilities of the backends that can run a mixer."""
_OUTER, _INNER = ("in_proj", "out_proj"), ("conv1d", "x_proj", "dt_proj")
_CAUSAL = (*_OUTER, *_INNER)
_BIDIRECTIONAL = (*_CAUSAL, "conv1d_b", "x_proj_b", "dt_proj_b")


def check_backend(name: str) -> str:
    """Return the name of a backend. Raises ValueError for another name; the first input decides whether it can run."""
    if name != "auto" and name not in backends.BACKENDS:
        raise ValueError(f"backend is {name!r}; allowed: 'auto', {', '.join(map(repr, backends.BACKENDS))}")
    return name


def inverse_softplus(x: Tensor) -> Tensor:
    """Return log(exp(x) - 1), of positive x, to the last digits of small x too."""
    return x + (-torch.expm1(-x)).log()


class Mamba(nn.Module):
    """Bidirectional Mamba mixer of VideoMamba; with `bimamba=False` the causal one, which can carry a state.

        x, z = in_proj(hidden)
        y    = sum over directions: scan(c, dt_proj(dt), -exp(A_log), B, C, D, z)
               where c = silu(conv(x)) and dt, B, C = x_proj(c)
        out  = out_proj(y)

    There are E = expand * d_model channels with `d_state` states each. The convolution reads `d_conv` tokens, and dt has the
    rank `dt_rank`, by default d_model / 16, rounded up. `conv_bias` and `bias` say whether the convolutions, and in_proj and
    out_proj, have a bias. `dt_min` to `dt_init_floor` are upstream's options of dt_proj's initial values. Parameters are on
    `device` and in `dtype`, but A_log and D, which are float32. `layer_idx` names the layer in messages.

    Tokens stay (B, L, channels) throughout, and native kernels make no reversed copy. Parameter names, shapes and
    initial values are upstream's. `backend` is a name of `fused.backends`, or "auto"; `use_fast_path=False` makes "auto"
    choose "torch". Raises ValueError for an unknown `dt_init` or backend.

    The kernels read the weights of the modules. A module that is more than its weight (an adapter such as LoRA, hooks, a
    pruning) is called instead, and the mixer runs in more operators around it; a quantised one raises ValueError.
    """

    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: Tensor
    D: Tensor
    conv1d_b: nn.Conv1d  # the backward direction; absent with bimamba=False
    x_proj_b: nn.Linear
    dt_proj_b: nn.Linear
    A_b_log: Tensor
    D_b: Tensor

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bimamba: bool = True,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init is {dt_init!r}; allowed: 'random', 'constant'")
        self.backend = check_backend(backend)
        self.use_fast_path, self.layer_idx, self.bimamba = use_fast_path, layer_idx, bimamba
        self.d_model, self.d_state, self.d_conv, self.d_inner = d_model, d_state, d_conv, expand * d_model
        self.dt_rank = -(-d_model // 16) if dt_rank == "auto" else int(dt_rank)

        factory_kwargs = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory_kwargs)
        self._add_direction("", "A_log", conv_bias, factory_kwargs)
        if bimamba:
            self._add_direction("_b", "A_b_log", conv_bias, factory_kwargs)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory_kwargs)
        self._init_dt_proj(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)

    def _add_direction(self, suffix: str, A_log: str, conv_bias: bool, factory_kwargs: dict) -> None:
        """Register one direction's parameters; A and D are float32 whatever the dtype of the rest."""
        E, N, R, K = self.d_inner, self.d_state, self.dt_rank, self.d_conv
        self.add_module("conv1d" + suffix, nn.Conv1d(E, E, K, padding=K - 1, groups=E, bias=conv_bias, **factory_kwargs))
        self.add_module("x_proj" + suffix, nn.Linear(E, R + 2 * N, bias=False, **factory_kwargs))
        self.add_module("dt_proj" + suffix, nn.Linear(R, E, **factory_kwargs))
        float32_kwargs = {"device": factory_kwargs["device"], "dtype": torch.float32}
        self.register_parameter(A_log, nn.Parameter(torch.arange(1, N + 1, **float32_kwargs).log().expand(E, N).clone()))
        self.register_parameter("D" + suffix, nn.Parameter(torch.ones(E, **float32_kwargs)))

    @torch.no_grad()
    def _init_dt_proj(self, dt_min: float, dt_max: float, dt_init: str, dt_scale: float, step_floor: float) -> None:
        """Initialise the forward dt_proj as upstream does: softplus(bias) is log-uniform between dt_min and dt_max."""
        weight, bias = self.dt_proj.weight, self.dt_proj.bias
        bound = dt_scale / math.sqrt(self.dt_rank)
        weight.fill_(bound) if dt_init == "constant" else weight.uniform_(-bound, bound)
        step = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(dt_min), math.log(dt_max)).exp_()
        step.clamp_(min=step_floor)
        bias.copy_(inverse_softplus(step))

    def init_state(self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> State:
        """Return the state before `batch_size` sequences: zeros (B, E, K-1) in `dtype` and (B, E, N) in at least float32.

        `dtype` is the stream's. Without a dtype it is that of in_proj's output, which autocast decides where it is on; without
        a device that of the parameters. Raises ValueError for a bidirectional mixer and for a batch of 0 clips.
        """
        self._require_causal()
        weight = weight_of(self.in_proj)
        target = torch.device(device) if device is not None else weight.device
        E = self.d_inner
        return zero_state(batch_size, (E, self.d_conv - 1), (E, self.d_state), dtype or linear_dtype(weight, target), target)

    def forward(
        self,
        hidden: Float[Tensor, "B L D"],
        state: State | None = None,
        return_state: bool = False,
        *,
        backend: str | None = None,
    ) -> Float[Tensor, "B L D"] | tuple[Float[Tensor, "B L D"], State]:
        """Return the output (B, L, D) for tokens `hidden` (B, L, D); with `return_state` also what the next chunk's `state` is.

        Chunks chained by their states give the result of the whole sequence, gradients included (`bimamba=False` only).
        `backend` is the choice that a model has made for this forward; without it the mixer chooses from its own `backend`.

        Raises ValueError for a state with a bidirectional mixer or with a backend that cannot carry one, ValueError or
        TypeError for a state of other shapes, dtypes or devices, ValueError for quantised weights, BackendError for a backend
        that cannot run here.
        """
        carried = state is not None or return_state
        requested = backend or self.backend
        if carried:
            self._require_causal()
        if backend is None or state is not None or hidden.dtype not in KERNEL_DTYPES:  # else the model has checked already
            required = {"initial_state": state is not None}
            backends.check_abilities("mixer", BACKENDS, requested, hidden.dtype, required)
        if carried and requested == "mamba_ssm_inner":
            raise ValueError("mixer: backend 'mamba_ssm_inner' does not return a state; use backend='torch'")
        backend = backend or self.resolve_backend(hidden)
        operators = backends.OPERATOR_BACKEND.get(backend, backend)
        called = modules_to_call(self._modules, _BIDIRECTIONAL if self.bimamba else _CAUSAL, self.layer_idx)
        if operators == "mamba_ssm" and not return_state and not called:
            inner = backend == "mamba_ssm_inner"
            return mamba_ssm.mamba_mixer(hidden, self.in_proj, self.out_proj, self.directions(), inner=inner)
        if operators == "native" and not carried and (not called or called == ("in_proj",)):
            return self._run_native(hidden, called, backend)
        if operators == "cpu" and not carried and not called and (out := self._run_cpu(hidden)) is not None:
            return out
        on_cpu = operators in ("torch", "cpu")  # `linear` leaves other devices to PyTorch
        xz = linear(hidden, self.in_proj) if on_cpu and "in_proj" not in called else self.in_proj(hidden)
        x, z = xz.chunk(2, dim=-1)
        if state is not None:
            check_mixer_state(state, x, self.d_conv, (self.d_inner, self.d_state), self.layer_idx)
        calls_inner = any(name not in _OUTER for name in called)
        if called and (self._leaves_cpu_operator(hidden, backend, carried) if on_cpu else calls_inner or not carried):
            note_slow_path(self, called, self.layer_idx)
        if operators == "native" and not calls_inner:
            y, state = self._scan_native(x, z, state)
        else:
            y, state = self._scan_eager(x, z, called, state, backend)
        out = linear(y, self.out_proj) if on_cpu and "out_proj" not in called else self.out_proj(y)
        return (out, state) if return_state else out

    def resolve_backend(self, x: Tensor) -> str:
        """Return the name of the backend that runs where `x` is. Raises BackendError for one that cannot run there."""
        return backends.choose(self.backend, x.device, use_fast_path=self.use_fast_path)

    def directions(self, squeeze: bool = True) -> tuple[DirectionWeights, ...]:
        """Return the weights of the forward scan, which can carry a state, and of the backward scan if there is one.

        A is A_log, the logarithm of -A. The convolution's weights are (E, K), without `squeeze` as they are stored, (E, 1, K).
        """
        conv, dt = self.conv1d, self.dt_proj
        weight = conv.weight.squeeze(1) if squeeze else conv.weight
        first = DirectionWeights(weight, conv.bias, self.x_proj.weight, dt.weight, dt.bias, self.A_log, self.D)
        if not self.bimamba:
            return (first,)
        conv, dt = self.conv1d_b, self.dt_proj_b
        weight = conv.weight.squeeze(1) if squeeze else conv.weight
        return first, DirectionWeights(weight, conv.bias, self.x_proj_b.weight, dt.weight, dt.bias, self.A_b_log, self.D_b)

    def _run_native(self, hidden: Tensor, called: Sequence[str], backend: str) -> Tensor:
        """Return the mixer's output (B, L, D) by one native operator, which computes in_proj too unless it has to be called."""
        from fused.ops.mamba_inner.native import mamba_inner

        in_proj, out_proj = self.in_proj, self.out_proj
        linear, dtype = Linear(in_proj.weight, in_proj.bias) if not called else None, autocast_dtype(hidden.device)
        if linear is None or (dtype is None and hidden.dtype != linear.weight.dtype):  # for the latter, Linear raises its error
            hidden = self.in_proj(hidden)
            dtype = hidden.dtype
        return mamba_inner(
            hidden, linear, self.directions(squeeze=False), Linear(out_proj.weight, out_proj.bias),
            dtype=dtype or hidden.dtype, keep_states=backend == "native_kept",
        )  # fmt: skip

    def _run_cpu(self, hidden: Tensor) -> Tensor | None:
        """Return the mixer's output (B, L, D) by one operator for CPUs, None where dtypes differ or are of half precision."""
        in_proj, out_proj = (Linear(m.weight, m.bias) for m in (self.in_proj, self.out_proj))
        arguments = hidden, in_proj, self.directions(squeeze=False), out_proj
        return mamba_inner_cpu(*arguments) if takes(*arguments) else None

    @staticmethod
    def _leaves_cpu_operator(hidden: Tensor, backend: str, carried: bool) -> bool:
        """Return whether a mixer without modules that are called would run as one operator for CPUs."""
        return backend == "cpu" and not carried and hidden.dtype in CPU_DTYPES and autocast_dtype(hidden.device) is None

    def _scan_native(self, x: Tensor, z: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Return what `_scan_eager` returns, by one native operator a direction."""
        from fused.ops.mamba_inner.one_direction import mamba_inner_one_direction

        first, *second = self.directions()
        y = mamba_inner_one_direction(x, second[0], reverse=True, A_is_log=True)[0] if second else None
        return mamba_inner_one_direction(x, first, z=z, y_other_direction=y, state=state, reverse=False, A_is_log=True)

    def _scan_eager(
        self, x: Tensor, z: Tensor, called: Sequence[str], state: State | None, backend: str
    ) -> tuple[Tensor, Any]:
        """Return gated y (B, L, E) of all directions over x and z (B, L, E), and the state that leaves a causal mixer.

        Of the modules that are `called` no weight is read.
        """
        if self.bimamba and backend in ("torch", "cpu") and not called:
            return both_directions_eager(x, self.directions(), z, backend), None
        suffixes = ("", "_b") if self.bimamba else ("",)
        directions = [self._uncalled_weights(called, suffix) for suffix in suffixes] if called else self.directions()
        ys, states = [], []
        for i, (suffix, weights) in enumerate(zip(suffixes, directions, strict=True)):
            modules = {name: getattr(self, name + suffix) for name in _INNER if name + suffix in called}
            A = -weights.A.to(accumulation_dtype(weights.A.dtype)).exp()
            conv, conv_bias, x_proj, dt_proj, dt_bias, _, D = weights
            weights = DirectionWeights(conv, conv_bias, x_proj, dt_proj, dt_bias, A, D)  # Dynamo of PyTorch 2.8 has no _replace
            y, leaving = one_direction_eager(
                x, weights, z=z, state=None if i else state, reverse=i == 1, backend=backend,
                d_conv=self.d_conv, **modules,
            )  # fmt: skip
            ys.append(y)
            states.append(leaving)
        return ys[0] if len(ys) == 1 else ys[0] + ys[1], states[0]

    def _uncalled_weights(self, called: Collection[str], suffix: str) -> DirectionWeights:
        """Return the weights of the direction with this suffix; for modules that are `called`, None, and nothing is read."""
        modules = ((name + suffix, getattr(self, name + suffix)) for name in _INNER)
        weights: Any = [(None, None) if name in called else (m.weight, m.bias) for name, m in modules]
        (conv, conv_bias), (x_proj, _), (dt_proj, dt_bias) = weights
        conv = conv if conv is None else conv.squeeze(1)
        A_log, D = (self.A_b_log, self.D_b) if suffix else (self.A_log, self.D)
        read: Any = (conv, conv_bias, x_proj, dt_proj, dt_bias, A_log, D)
        return DirectionWeights(*read)

    def _require_causal(self) -> None:
        if self.bimamba:
            raise ValueError(
                "a bidirectional mixer cannot carry a state: its backward direction starts at the last token of the video, "
                "so that a chunk would need the future. Run the whole clip at once, or build the mixer with bimamba=False"
            )
