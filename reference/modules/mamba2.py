"""The Mamba-2 mixer: one scan over heads of channels, a gate and a norm."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from reference.modules.state import State, check_state, stream_dtype, zero_state
from reference.ops.causal_conv1d import causal_conv1d
from reference.ops.dtypes import accumulation_dtype
from reference.ops.ssd import ssd


class ScanDirection(NamedTuple):
    """The parameters of one scan direction."""

    conv: nn.Conv1d
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter


class GatedRMSNorm(nn.Module):
    """RMSNorm over groups of channels, with a gate before or after it: norm(y silu(z)) or norm(y) silu(z).

    All arithmetic is in at least float32. Upstream: `mamba_ssm.ops.triton.layernorm_gated.RMSNorm`.
    """

    def __init__(
        self,
        d: int,
        groups: int = 1,
        norm_before_gate: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.groups, self.norm_before_gate, self.eps = groups, norm_before_gate, eps
        self.weight = nn.Parameter(torch.ones(d, device=device, dtype=dtype))

    def forward(self, y: Float[Tensor, "*B E"], z: Float[Tensor, "*B E"]) -> Float[Tensor, "*B E"]:
        """Return the gated and normalised y in y's dtype."""
        precise = accumulation_dtype(y.dtype)
        with torch.autocast(y.device.type, enabled=False):
            v, gate = y.to(precise), F.silu(z.to(precise))
            if not self.norm_before_gate:
                v = v * gate
            group = v.unflatten(-1, (self.groups, -1))
            v = (group * torch.rsqrt(group.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight.to(precise)
            if self.norm_before_gate:
                v = v * gate
            return v.to(y.dtype)


def _check_options(given: dict[str, Any]) -> None:
    """Raise ValueError, with its name, for a size that is no positive integer, and for numbers and pairs that are none."""
    sizes = ("d_model", "d_state", "d_conv", "expand", "headdim", "ngroups", "d_ssm")
    for name in sizes if given["d_ssm"] is not None else sizes[:-1]:
        if type(given[name]) is not int or given[name] < 1:
            raise ValueError(f"{name} is {given[name]!r}; allowed are whole numbers from 1 up")
    for name in ("dt_min", "dt_max", "dt_init_floor"):
        if type(given[name]) not in (int, float) or not 0 < given[name] < math.inf:
            raise ValueError(f"{name} is {given[name]!r}; allowed are positive numbers")
    for name in ("A_init_range", "dt_limit"):
        pair = given[name]
        numbers = [type(x) in (int, float) for x in pair] if isinstance(pair, tuple | list) else []
        if numbers != [True, True] or not pair[0] <= pair[1]:
            raise ValueError(f"{name} is {pair!r}; allowed are two numbers (low, high), low <= high")
    if not 0 < given["A_init_range"][0]:
        raise ValueError(f"A_init_range is {given['A_init_range']!r}; allowed are positive numbers")


class Mamba2(nn.Module):
    """Mamba-2 mixer, causal, or with `bimamba=True` a scan from either end.

        z0, x0, z, xBC, dt = in_proj(u)                   z0 and x0 only with d_ssm < expand d_model
        for each direction, with its own conv, dt_bias, A_log, D:
            x, B, C = silu(conv(xBC))
            y       = ssd(x, dt, A=-exp(A_log), B, C, D, dt_bias)
        out = out_proj([silu(z0) x0, norm(y silu(z))])    norm_before_gate: norm(y) silu(z);  no rmsnorm: y silu(z)

    y is the sum of the directions, not halved, before gate and norm. There are d_ssm / headdim heads, and ngroups groups of
    heads share B and C and the norm's statistics. `dt_limit` clamps dt after its softplus. `D_has_hdim` gives D to every
    channel. Parameter names, shapes and initial values are those of upstream's `Mamba2`; the backward direction's are
    `conv1d_b`, `dt_bias_b`, `A_b_log` and `D_b`. `chunk_size` and `use_mem_eff_path` are accepted because upstream has them;
    they change nothing here. Raises ValueError for sizes that do not divide.
    """

    conv1d: nn.Conv1d
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter
    conv1d_b: nn.Conv1d  # this and the three below: only with bimamba=True
    dt_bias_b: nn.Parameter
    A_b_log: nn.Parameter
    D_b: nn.Parameter

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
    ) -> None:
        _check_options(locals())
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_inner = E = expand * d_model
        self.d_ssm = E if d_ssm is None else d_ssm
        if not 0 < self.d_ssm <= E or self.d_ssm % headdim:
            raise ValueError(f"d_ssm is {self.d_ssm}; allowed are multiples of headdim={headdim} up to expand * d_model={E}")
        self.nheads = H = self.d_ssm // headdim
        if H % ngroups:
            raise ValueError(f"ngroups is {ngroups}; allowed are divisors of the {H} heads (d_ssm / headdim)")
        self.d_model, self.d_state, self.d_conv, self.headdim, self.ngroups = d_model, d_state, d_conv, headdim, ngroups
        self.D_has_hdim, self.norm_before_gate, self.dt_limit = D_has_hdim, norm_before_gate, (dt_limit[0], dt_limit[1])
        self.chunk_size, self.use_mem_eff_path, self.layer_idx, self.bimamba = chunk_size, use_mem_eff_path, layer_idx, bimamba
        self.d_mlp = E - self.d_ssm
        self.d_xBC = self.d_ssm + 2 * ngroups * d_state  # the convolved channels

        self.in_proj = nn.Linear(d_model, 2 * self.d_mlp + self.d_ssm + self.d_xBC + H, bias=bias, **factory)
        for suffix in ("", "_b") if bimamba else ("",):
            conv = nn.Conv1d(
                self.d_xBC, self.d_xBC, d_conv, groups=self.d_xBC, padding=d_conv - 1, bias=conv_bias, **factory
            )
            if conv_init is not None:
                nn.init.uniform_(conv.weight, -conv_init, conv_init)
            self.add_module("conv1d" + suffix, conv)
            dt = torch.exp(torch.rand(H, device=device) * math.log(dt_max / dt_min) + math.log(dt_min)).clamp(min=dt_init_floor)
            self.register_parameter("dt_bias" + suffix, nn.Parameter((dt + torch.log(-torch.expm1(-dt))).to(dtype)))
            A = torch.empty(H, device=device, dtype=torch.float32).uniform_(*A_init_range)
            self.register_parameter("A_b_log" if suffix else "A_log", nn.Parameter(A.log()))
            D = torch.ones(self.d_ssm if D_has_hdim else H, device=device)
            self.register_parameter("D" + suffix, nn.Parameter(D))
        self.norm = GatedRMSNorm(self.d_ssm, ngroups, norm_before_gate, **factory) if rmsnorm else None
        self.out_proj = nn.Linear(E, d_model, bias=bias, **factory)

    def init_state(self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> State:
        """Return the state before the first token: zeros (B, d_xBC, K-1) in `dtype` and (B, H, P, N) in at least float32.

        The default dtype is that of in_proj's output, under autocast that of autocast. The default device is that of the
        parameters. Raise ValueError for a bidirectional mixer or a batch size below 1, TypeError for an integer dtype.
        """
        self._require_causal()
        weight = self.in_proj.weight
        target = weight.device if device is None else torch.device(device)
        dtype = dtype or stream_dtype(weight, target)
        return zero_state(batch_size, self.d_xBC, self.d_conv, self.scan_shape, dtype, target)

    @property
    def scan_shape(self) -> tuple[int, int, int]:
        """Return the shape of S: heads H, channels of a head P, states N."""
        return self.nheads, self.headdim, self.d_state

    def _require_causal(self) -> None:
        """Raise ValueError for a bidirectional mixer."""
        if self.bimamba:
            raise ValueError(
                "a bidirectional mixer has no state to carry: its backward direction starts at the end of the sequence and "
                "needs the future. Run the whole sequence at once, or build the mixer with bimamba=False"
            )

    def forward(
        self,
        u: Float[Tensor, "B L D"],
        *,
        seq_idx: Int[Tensor, "B L"] | None = None,
        state: State | None = None,
        return_state: bool = False,
    ) -> Float[Tensor, "B L D"] | tuple[Float[Tensor, "B L D"], State]:
        """Mix the tokens of u (B, L, D). Return (B, L, D), and with `return_state` also the state after the last token.

        `seq_idx` numbers the segments of each row, ascending; convolution and scan start anew where it changes. A state
        continues a sequence, in each row its first segment: chunks that are chained by it give what the whole sequence gives,
        gradients included. A chunk that begins with a new segment must not be given the state of the one before. The given
        state is not changed.

        Raise ValueError if a bidirectional mixer is given a state or asked for one, and for a state of another shape or device.
        Raise TypeError for a state of another dtype.
        """
        if state is not None or return_state:
            self._require_causal()
        sizes = (self.d_mlp, self.d_mlp, self.d_ssm, self.d_xBC, self.nheads)
        z0, x0, z, xBC, dt = self.in_proj(u).split(sizes, dim=-1)
        if state is not None:
            check_state(state, xBC, self.d_conv, self.scan_shape, self.layer_idx)
        y, state = self.run_direction(xBC, dt, self.forward_direction, seq_idx, state)
        if self.bimamba:
            y = y + self.run_direction(xBC, dt, self.backward_direction, seq_idx, reverse=True)[0]
        if self.norm is None:
            precise = accumulation_dtype(y.dtype)
            y = (y.to(precise) * F.silu(z.to(precise))).to(y.dtype)
        else:
            y = self.norm(y, z)
        if self.d_mlp:
            y = torch.cat((F.silu(z0) * x0, y), dim=-1)
        out = self.out_proj(y)
        return (out, state) if return_state else out

    @property
    def forward_direction(self) -> ScanDirection:
        """The parameters of the forward scan."""
        return ScanDirection(self.conv1d, self.dt_bias, self.A_log, self.D)

    @property
    def backward_direction(self) -> ScanDirection:
        """The parameters of the backward scan."""
        return ScanDirection(self.conv1d_b, self.dt_bias_b, self.A_b_log, self.D_b)

    def run_direction(
        self,
        xBC: Tensor,
        dt: Tensor,
        p: ScanDirection,
        seq_idx: Tensor | None,
        state: State | None = None,
        reverse: bool = False,
    ) -> tuple[Tensor, State]:
        """Run one direction, of parameters `p`, over a sequence or a chunk of one; xBC is (B, L, d_xBC), dt (B, L, H).

        Return y before the gate (B, L, d_ssm) and the state after the last token that the direction reads.
        """
        conv_state, ssm_state = state if state is not None else (None, None)
        weight, bias = p.conv.weight.squeeze(1), p.conv.bias
        c, conv_state = causal_conv1d(xBC, weight, bias, initial_state=conv_state, reverse=reverse, seq_idx=seq_idx)
        GN = self.ngroups * self.d_state
        x, B, C = c.split((self.d_ssm, GN, GN), dim=-1)
        x, B, C = x.unflatten(2, (-1, self.headdim)), B.unflatten(2, (self.ngroups, -1)), C.unflatten(2, (self.ngroups, -1))
        A = -torch.exp(p.A_log.to(accumulation_dtype(p.A_log.dtype)))
        D = p.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else p.D
        y, ssm_state = ssd(
            x, dt, A, B, C, D, dt_bias=p.dt_bias, dt_limit=self.dt_limit,
            initial_state=ssm_state, seq_idx=seq_idx, reverse=reverse,
        )  # fmt: skip
        return y.flatten(2), (conv_state, ssm_state)
