"""The Mamba mixer: in_proj, two scans over the same tokens from either end, one gate, out_proj."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fused import backends
from fused.backends import NATIVE, TORCH, Abilities
from fused.modules.state import State, check_mixer_state, linear_dtype, zero_state
from fused.ops import mamba_ssm as upstream
from fused.ops.causal_conv1d import api as conv
from fused.ops.selective_scan import api as scan
from fused.runtime.dtypes import KERNEL_DTYPES, accumulation_dtype

BACKENDS = {
    "native": NATIVE,
    "mamba_ssm": Abilities(False, False, True, False, KERNEL_DTYPES, ("cuda",)),
    "torch": replace(TORCH, fullgraph=False),  # as its scan
}
"""Abilities of the backends that can run a mixer."""


class Direction(NamedTuple):
    """What one scan does not share with the other, and from which end it starts."""

    conv: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: Tensor
    D: Tensor
    reverse: bool

    @property
    def parameters(self) -> dict[str, Any]:
        """As the native operators take them."""
        return {
            "conv": self.conv.weight.squeeze(1), "conv_bias": self.conv.bias, "proj": self.x_proj.weight,
            "dt": self.dt_proj.weight, "dt_bias": self.dt_proj.bias, "A": self.A_log, "D": self.D,
        }  # fmt: skip


def check_backend(name: str) -> str:
    """The name, if it is one; whether it can run is decided by the device of the first input."""
    if name != "auto" and name not in backends.BACKENDS:
        raise ValueError(f"backend is {name!r}; allowed: 'auto', {', '.join(map(repr, backends.BACKENDS))}")
    return name


class Mamba(nn.Module):
    """Bidirectional Mamba mixer of VideoMamba; with `bimamba=False` the causal one, which can carry a state.

        x, z = in_proj(hidden)
        y    = sum over directions: scan(c, dt_proj(dt), -exp(A_log), B, C, D, z)
               where c = silu(conv(x)) and dt, B, C = x_proj(c)
        out  = out_proj(y)

    Tokens stay (B, L, channels) throughout and neither direction copies them in reverse. Parameter names, shapes and
    initial values are upstream's. `backend` is a name of `fused.backends`, or "auto"; `use_fast_path=False` makes "auto"
    choose "torch".
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

        place = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **place)
        self._add_direction("", "A_log", conv_bias, place)
        if bimamba:
            self._add_direction("_b", "A_b_log", conv_bias, place)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **place)
        self._init_steps(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)

    def _add_direction(self, suffix: str, A_log: str, conv_bias: bool, place: dict) -> None:
        """Register one direction's parameters; A and D are float32 whatever the dtype of the rest."""
        E, N, R, K = self.d_inner, self.d_state, self.dt_rank, self.d_conv
        self.add_module("conv1d" + suffix, nn.Conv1d(E, E, K, padding=K - 1, groups=E, bias=conv_bias, **place))
        self.add_module("x_proj" + suffix, nn.Linear(E, R + 2 * N, bias=False, **place))
        self.add_module("dt_proj" + suffix, nn.Linear(R, E, **place))
        precise = {"device": place["device"], "dtype": torch.float32}
        self.register_parameter(A_log, nn.Parameter(torch.arange(1, N + 1, **precise).log().expand(E, N).clone()))
        self.register_parameter("D" + suffix, nn.Parameter(torch.ones(E, **precise)))

    @torch.no_grad()
    def _init_steps(self, dt_min: float, dt_max: float, dt_init: str, dt_scale: float, floor: float) -> None:
        """Upstream's start of the forward dt_proj: softplus(bias) is log-uniform between dt_min and dt_max."""
        weight, bias = self.dt_proj.weight, self.dt_proj.bias
        reach = dt_scale / math.sqrt(self.dt_rank)
        weight.fill_(reach) if dt_init == "constant" else weight.uniform_(-reach, reach)
        step = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(dt_min), math.log(dt_max)).exp_()
        step.clamp_(min=floor)
        bias.copy_(step + (-torch.expm1(-step)).log())  # the inverse of softplus

    def init_state(self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> State:
        """The state with nothing before it: zeros (B, E, K-1) in `dtype`, the stream's, and (B, E, N) in at least float32.

        Without a dtype it is that of in_proj's output, which autocast decides where it is on; without a device that of
        the parameters. Raises ValueError for a bidirectional mixer and for a batch of none.
        """
        self._require_causal()
        weight = self.in_proj.weight
        at = torch.device(device) if device is not None else weight.device
        E = self.d_inner
        return zero_state(batch_size, (E, self.d_conv - 1), (E, self.d_state), dtype or linear_dtype(weight, at), at)

    def forward(
        self,
        hidden: Float[Tensor, "B L D"],
        state: State | None = None,
        return_state: bool = False,
        *,
        backend: str | None = None,
    ) -> Float[Tensor, "B L D"] | tuple[Float[Tensor, "B L D"], State]:
        """Mix tokens; with `return_state` also return what the next chunk's `state` must be.

        Chunks chained by their states equal the whole, gradients included (`bimamba=False` only). `backend` is the
        choice a model has made for this forward; by itself the mixer chooses from its own `backend`.

        Raises ValueError for a state with a bidirectional mixer or with a backend that cannot carry one, ValueError or
        TypeError for a state of other shapes, dtypes or devices, BackendError for a backend that cannot run here.
        """
        self._check_state(hidden, state, return_state, backend or self.backend)
        backend = backend or backends.choose(self.backend, hidden.device, use_fast_path=self.use_fast_path)
        operators = backends.operators_of(backend)
        if operators == "mamba_ssm" and not return_state:
            return upstream.mix(hidden, self, inner=backend == "mamba_ssm_inner")
        xz = self.in_proj(hidden)
        if operators == "native" and state is None and not return_state:
            return self._native(xz, backend == "native_kept")
        x, z = xz.chunk(2, dim=-1)
        if state is not None:
            check_mixer_state(state, x, self.d_conv, self.d_state, self.layer_idx)
        first, *others = self._directions()
        y, state = self._scan(x, z, first, state, backend)
        for other in others:
            y = y + self._scan(x, z, other, None, backend)[0]
        out = self.out_proj(y)
        return (out, state) if return_state else out

    def _native(self, xz: Tensor, keep: bool) -> Tensor:
        """Everything behind in_proj as one operator; `keep` saves its backward the scan."""
        from fused.ops.mamba_inner import native as mixer

        directions = [own.parameters for own in self._directions()]
        return mixer.mix(xz, directions, self.out_proj.weight, self.out_proj.bias, keep)

    def _check_state(self, hidden: Tensor, state: State | None, return_state: bool, backend: str) -> None:
        carried = state is not None or return_state
        if carried:
            self._require_causal()
        backends.check_abilities("mixer", BACKENDS, backend, hidden.dtype, {"initial_state": state is not None})
        if carried and backend == "mamba_ssm_inner":
            raise ValueError("mixer: backend 'mamba_ssm_inner' does not return a state; use backend='torch'")

    def _require_causal(self) -> None:
        if self.bimamba:
            raise ValueError(
                "a bidirectional mixer cannot carry a state: its backward direction starts at the last token of the video, "
                "so that a chunk would need the future. Run the whole clip at once, or build the mixer with bimamba=False"
            )

    def _directions(self) -> tuple[Direction, ...]:
        """The scans of this mixer, the one that can carry a state first."""
        ahead = Direction(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D, reverse=False)
        if not self.bimamba:
            return (ahead,)
        return ahead, Direction(self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, reverse=True)

    def _scan(self, x: Tensor, z: Tensor, own: Direction, state: State | None, backend: str) -> tuple[Tensor, State]:
        if backends.operators_of(backend) == "native":
            from fused.ops.mamba_inner.one_direction import walk

            return walk(x, z, None, state, own.parameters, reverse=own.reverse, logarithm=True)
        conv_state, ssm_state = (None, None) if state is None else state
        taps, reverse = own.conv.weight.squeeze(1), own.reverse
        c, conv_state = conv.causal_conv1d(
            x, taps, own.conv.bias, initial_state=conv_state, reverse=reverse, backend=backend
        )  # fmt: skip
        dt, B, C = own.x_proj(c).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        delta = F.linear(dt, own.dt_proj.weight)  # the scan adds dt_proj's bias, unrounded
        A = -own.A_log.to(accumulation_dtype(own.A_log.dtype)).exp()
        y, ssm_state = scan.selective_scan(
            c, delta, A, B, C, own.D, z, own.dt_proj.bias, initial_state=ssm_state, reverse=reverse, backend=backend
        )
        return y, (conv_state, ssm_state)
