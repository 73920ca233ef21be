"""The Mamba-2 mixer: in_proj, convolution, a scan over heads of channels, a gate and a norm, out_proj."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fused import backends
from fused.backends import NATIVE, TORCH, Abilities
from fused.modules.mamba import check_backend, inverse_softplus
from fused.modules.mamba2_options import check_options
from fused.modules.state import State, check_mixer_state, linear_dtype, zero_state
from fused.modules.wrapped import describe, modules_to_call, weight_of
from fused.ops.causal_conv1d import api as conv_api
from fused.ops.gated_norm import MAX_WIDTH
from fused.ops.gated_norm.eager import gated_norm_eager
from fused.ops.seq_idx import check_seq_idx
from fused.ops.ssd import api as ssd_api
from fused.ops.ssd import mamba_ssm
from fused.runtime.dtypes import KERNEL_DTYPES, accumulation_dtype

BACKENDS = {
    "native": NATIVE,
    "mamba_ssm": Abilities(False, False, False, True, KERNEL_DTYPES, ("cuda",), fullgraph=False),
    "torch": replace(TORCH, fullgraph=False),
}
"""Abilities of the backends that can run a mixer; `reverse` stands for the bidirectional one."""


class GatedNorm(nn.Module):
    """The weight of the norm, and its options; the mixer computes it."""

    def __init__(self, dim: int, groups: int, norm_before_gate: bool, eps: float, **factory_kwargs: Any) -> None:
        super().__init__()
        self.groups, self.norm_before_gate, self.eps = groups, norm_before_gate, eps
        self.weight = nn.Parameter(torch.ones(dim, **factory_kwargs))


class Mamba2(nn.Module):
    """Mamba-2 mixer: causal, can carry a state; with `bimamba=True` a scan from either end, which cannot.

        z0, x0, z, xBC, dt = in_proj(u)                   z0 and x0 only with d_ssm < expand d_model
        y   = sum over directions: ssd(x, dt, -exp(A_log), B, C, D, dt_bias), where x, B, C = silu(conv(xBC))
        out = out_proj([silu(z0) x0, norm(y silu(z))])    norm_before_gate: norm(y) silu(z);  no rmsnorm: y silu(z)

    There are d_ssm / headdim heads; ngroups groups of heads share B and C and the statistics of the norm. `dt_limit` clamps dt
    after its softplus. `D_has_hdim` gives every channel a D of its own. Parameter names, shapes and initial values are
    upstream's; those of the backward direction are conv1d_b, dt_bias_b, A_b_log and D_b. `chunk_size` and `use_mem_eff_path`
    are accepted and change nothing: the kernels choose. `backend` is a name of `fused.backends`, or "auto"; with
    any, norms of more than 8192 channels are PyTorch operations.
    """

    conv1d: nn.Conv1d
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    conv1d_b: nn.Conv1d  # the backward direction; absent with bimamba=False
    dt_bias_b: Tensor
    A_b_log: Tensor
    D_b: Tensor

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: Sequence[float | int] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: Sequence[float | int] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        conv_init: float | None = None,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bimamba: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        check_options(locals())
        super().__init__()
        self.backend = check_backend(backend)
        self.d_inner = expand * d_model
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if not 0 < self.d_ssm <= self.d_inner or self.d_ssm % headdim:
            raise ValueError(
                f"d_ssm is {self.d_ssm}; allowed: multiples of headdim={headdim} up to expand * d_model={self.d_inner}"
            )
        self.nheads = self.d_ssm // headdim
        if self.nheads % ngroups:
            raise ValueError(f"ngroups is {ngroups}; allowed: divisors of the {self.nheads} heads (d_ssm / headdim)")
        self.d_model, self.d_state, self.d_conv, self.headdim, self.ngroups = d_model, d_state, d_conv, headdim, ngroups
        self.D_has_hdim, self.norm_before_gate = D_has_hdim, norm_before_gate
        self.dt_limit = ssd_api.check_dt_limit("Mamba2", dt_limit)
        self.chunk_size, self.use_mem_eff_path = chunk_size, use_mem_eff_path
        self.layer_idx, self.bimamba = layer_idx, bimamba
        self.d_mlp, self.d_xBC = self.d_inner - self.d_ssm, self.d_ssm + 2 * ngroups * d_state

        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, sum(self._widths()), bias=bias, **factory_kwargs)
        for suffix in ("", "_b") if bimamba else ("",):
            self._add_convolution(suffix, conv_bias, conv_init, factory_kwargs)
            self._add_scan(suffix, A_init_range, (dt_min, dt_max, dt_init_floor), factory_kwargs)
        self.norm = GatedNorm(self.d_ssm, ngroups, norm_before_gate, 1e-5, **factory_kwargs) if rmsnorm else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory_kwargs)

    def _widths(self) -> tuple[int, ...]:
        """Return the widths of z0, x0, z, xBC and dt, the parts of in_proj's rows."""
        return self.d_mlp, self.d_mlp, self.d_ssm, self.d_xBC, self.nheads

    def _add_convolution(self, suffix: str, bias: bool, init: float | None, factory_kwargs: dict) -> None:
        E, K = self.d_xBC, self.d_conv
        conv = nn.Conv1d(E, E, K, padding=K - 1, groups=E, bias=bias, **factory_kwargs)
        if init is not None:
            nn.init.uniform_(conv.weight, -init, init)
        self.add_module("conv1d" + suffix, conv)

    @torch.no_grad()
    def _add_scan(
        self, suffix: str, A_range: Sequence[float | int], steps: Sequence[float | int], factory_kwargs: dict
    ) -> None:
        """Register dt_bias, A_log and D of a direction; A_log and D are float32 whatever the dtype of the rest.

        softplus(dt_bias) is log-uniform between the first two of `steps` and at least the third.
        """
        float32_kwargs = {"device": factory_kwargs["device"], "dtype": torch.float32}
        low, high, floor = steps
        step = torch.empty(self.nheads, **float32_kwargs).uniform_(math.log(low), math.log(high)).exp_().clamp_(min=floor)
        bias = inverse_softplus(step).to(factory_kwargs["dtype"] or step.dtype)
        self.register_parameter("dt_bias" + suffix, nn.Parameter(bias))
        A_log = torch.empty(self.nheads, **float32_kwargs).uniform_(*A_range).log_()
        self.register_parameter("A_b_log" if suffix else "A_log", nn.Parameter(A_log))
        D = torch.ones(self.d_ssm if self.D_has_hdim else self.nheads, **float32_kwargs)
        self.register_parameter("D" + suffix, nn.Parameter(D))

    @property
    def scan_shape(self) -> tuple[int, int, int]:
        """Return the shape of a scan's state: heads, channels of a head, states."""
        return self.nheads, self.headdim, self.d_state

    def init_state(self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> State:
        """Return the state before a sequence: zeros (B, d_xBC, K-1) in `dtype`, the stream's, and (B, H, P, N) in at least
        float32.

        Without a dtype it is that of in_proj's output, which autocast decides where it is on; without a device that of the
        parameters. Raises ValueError for a bidirectional mixer and for a batch of 0 clips.
        """
        self._require_causal()
        weight = weight_of(self.in_proj)
        target = torch.device(device) if device is not None else weight.device
        conv = (self.d_xBC, self.d_conv - 1)
        return zero_state(batch_size, conv, self.scan_shape, dtype or linear_dtype(weight, target), target)

    def forward(
        self,
        u: Float[Tensor, "B L D"],
        *,
        seq_idx: Int[Tensor, "B L"] | None = None,
        state: State | None = None,
        return_state: bool = False,
        backend: str | None = None,
    ) -> Float[Tensor, "B L D"] | tuple[Float[Tensor, "B L D"], State]:
        """Return the mixer's output (B, L, D); with `return_state` also return what the next chunk's `state` must be.

        `seq_idx` numbers the segments of each row, ascending: convolution and scan start anew where it changes. A state
        continues the first segment of each row; chunks chained by their states give the result of the whole sequence,
        gradients included. A chunk that begins with a new segment must not get the state of the segment before. `backend` is
        the choice that a model has made for this forward; without it the mixer chooses from its own `backend`.

        Raises TypeError or ValueError for a seq_idx that does not fit, ValueError for a state with a bidirectional mixer or
        with a backend that cannot carry one, ValueError or TypeError for a state of other shapes, dtypes or devices,
        BackendError for a backend that cannot run here.
        """
        carried = state is not None or return_state
        if carried:
            self._require_causal()
        required = {"initial_state": carried, "reverse": self.bimamba}
        backends.check_abilities("mixer", BACKENDS, backend or self.backend, u.dtype, required)
        backend = backend or backends.choose(self.backend, u.device)
        convolutions = ("conv1d", "conv1d_b") if self.bimamba else ("conv1d",)
        if called := modules_to_call(self._modules, (*convolutions, "in_proj", "out_proj"), self.layer_idx):
            wrapped = [name for name in called if name in convolutions]
            if wrapped:
                reason = describe(self.get_submodule(wrapped[0]))
                raise ValueError(f"{wrapped[0]} {reason}; allowed in a Mamba-2 mixer: a plain nn.Conv1d, whose weight is read")
        if seq_idx is not None:
            check_seq_idx("Mamba2", seq_idx, u.shape[0], u.shape[1], u.device)
        zxbcdt = self.in_proj(u)
        if backend == "mamba_ssm_inner":
            y = mamba_ssm.split_conv_scan(zxbcdt, self, seq_idx)
            return self.out_proj(y)
        z0, x0, z, xBC, dt = zxbcdt.split(self._widths(), dim=-1)
        if state is not None:
            check_mixer_state(state, xBC, self.d_conv, self.scan_shape, self.layer_idx)
        y, state = self._scan(xBC, dt, seq_idx, state, backend, reverse=False, final=return_state)
        if self.bimamba:
            y = y + self._scan(xBC, dt, seq_idx, None, backend, reverse=True, final=False)[0]
        y = self._gate(y, z, backend)
        if self.d_mlp:
            y = torch.cat((F.silu(z0) * x0, y), dim=-1)
        out = self.out_proj(y)
        return (out, state) if return_state else out

    def _scan(
        self, xBC: Tensor, dt: Tensor, seq_idx: Tensor | None, state: State | None, backend: str, reverse: bool, final: bool
    ) -> tuple[Tensor, Any]:
        """Return y (B, L, d_ssm) of one direction before the gate, and the state after the last token that it reads.

        Without `final` the scan's state may be empty or None.
        """
        if reverse:
            conv, dt_bias, A_log, D = self.conv1d_b, self.dt_bias_b, self.A_b_log, self.D_b
        else:
            conv, dt_bias, A_log, D = self.conv1d, self.dt_bias, self.A_log, self.D
        conv_state, ssm_state = state if state is not None else (None, None)
        weight = conv.weight.squeeze(1)
        options: dict[str, Any] = {"initial_state": conv_state, "reverse": reverse}
        if seq_idx is None:
            c, conv_state = conv_api.implementation(backend)(xBC, weight, conv.bias, **options)
        elif backends.operators_of(backend) == "mamba_ssm":
            c = mamba_ssm.convolve_segments(xBC, weight, conv.bias, seq_idx)
        else:
            c, conv_state = conv_api.implementation(backend, packed=True)(xBC, weight, conv.bias, seq_idx=seq_idx, **options)
        GN = self.ngroups * self.d_state
        x, B, C = c.split((self.d_ssm, GN, GN), dim=-1)
        B, C = (m.unflatten(2, (self.ngroups, -1)) for m in (B, C))
        A = -A_log.to(accumulation_dtype(A_log.dtype)).exp()
        y, ssm_state = ssd_api.implementation(backend)(
            x.unflatten(2, (-1, self.headdim)), dt, A, B, C, D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else D,
            dt_bias=dt_bias, dt_limit=self.dt_limit, initial_state=ssm_state, seq_idx=seq_idx, reverse=reverse,
            final=final,
        )  # fmt: skip
        return y.flatten(2), (conv_state, ssm_state)

    def _gate(self, y: Tensor, z: Tensor, backend: str) -> Tensor:
        """Return the gated and normalised y (B, L, d_ssm)."""
        if self.norm is None:
            return gated_norm_eager(y, z, None)
        norm = self.norm
        options: dict[str, Any] = {"groups": norm.groups, "norm_before_gate": norm.norm_before_gate, "eps": norm.eps}
        operators = backends.operators_of(backend)
        if operators == "native" and self.d_ssm // norm.groups <= MAX_WIDTH:
            from fused.ops.gated_norm.native import gated_norm_native

            return gated_norm_native(y, z, norm.weight, **options)
        run = mamba_ssm.gated_norm if operators == "mamba_ssm" else gated_norm_eager
        return run(y, z, norm.weight, **options)

    def _require_causal(self) -> None:
        if self.bimamba:
            raise ValueError(
                "a bidirectional mixer cannot carry a state: its backward direction starts at the last token, so that a chunk "
                "would need the future. Run the whole sequence at once, or build the mixer with bimamba=False"
            )
