"""The Mamba mixer of VideoMamba: two selective scans over the same tokens, one from each end, with one gate."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reference.modules.state import State, check_state, stream_dtype, zero_state
from reference.ops.causal_conv1d import causal_conv1d
from reference.ops.dtypes import accumulation_dtype
from reference.ops.selective_scan import selective_scan


class Direction(NamedTuple):
    """The parameters of one scan direction."""

    conv: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter


class Mamba(nn.Module):
    """Bidirectional Mamba mixer ("v2" of Vision Mamba, the one in VideoMamba), or the plain causal one.

        x, z = in_proj(hidden)
        for each direction, with its own conv, x_proj, dt_proj, A_log, D:
            c        = silu(conv(x))
            dt, B, C = x_proj(c)
            y        = scan(c, delta=dt_proj(dt), A=-exp(A_log), B, C, D) * silu(z)
        out = out_proj(y_forward + y_backward)

    There are E = expand * d_model channels with `d_state` states each; the convolution reads `d_conv` tokens, and dt has the
    rank `dt_rank`, by default d_model / 16, rounded up. `dt_min` to `dt_init_floor` are options of dt_proj's initial values.

    The sum is not halved. With `bimamba=False` there is the forward direction only. Parameter names, shapes and initial values
    are those of upstream's `Mamba` (the backward direction's are `conv1d_b`, `A_b_log`, `D_b` and so on). `use_fast_path` is
    accepted because upstream has it; it changes nothing here. Raises ValueError for an unknown `dt_init`.
    """

    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter
    conv1d_b: nn.Conv1d  # this and the four below: only with bimamba=True
    x_proj_b: nn.Linear
    dt_proj_b: nn.Linear
    A_b_log: nn.Parameter
    D_b: nn.Parameter

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
    ) -> None:
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init is {dt_init!r}; allowed are 'random' and 'constant'")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        E = expand * d_model
        self.d_model, self.d_state, self.d_conv, self.d_inner = d_model, d_state, d_conv, E
        self.dt_rank = R = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.bimamba, self.layer_idx, self.use_fast_path = bimamba, layer_idx, use_fast_path

        self.in_proj = nn.Linear(d_model, 2 * E, bias=bias, **factory)
        for suffix in ("", "_b") if bimamba else ("",):
            self.add_module("conv1d" + suffix, nn.Conv1d(E, E, d_conv, groups=E, padding=d_conv - 1, bias=conv_bias, **factory))
            self.add_module("x_proj" + suffix, nn.Linear(E, R + 2 * d_state, bias=False, **factory))
            self.add_module("dt_proj" + suffix, nn.Linear(R, E, **factory))
            A_log = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).log().repeat(E, 1)
            self.register_parameter("A_b_log" if suffix else "A_log", nn.Parameter(A_log))
            self.register_parameter("D" + suffix, nn.Parameter(torch.ones(E, device=device)))
        self.out_proj = nn.Linear(E, d_model, bias=bias, **factory)
        self._init_dt(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)

    @torch.no_grad()
    def _init_dt(self, dt_min: float, dt_max: float, dt_init: str, dt_scale: float, floor: float) -> None:
        """Draw the forward dt_proj so that softplus(bias) is log-uniform in [dt_min, dt_max]; VideoMamba redraws it later."""
        bound = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        uniform = torch.rand_like(self.dt_proj.bias, dtype=torch.float32)
        dt = torch.exp(uniform * math.log(dt_max / dt_min) + math.log(dt_min)).clamp(min=floor)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def init_state(self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> State:
        """Return the state before the first token: zeros (B, E, K-1) in `dtype` and (B, E, N) in at least float32.

        The default dtype is that of in_proj's output, under autocast that of autocast. The default device is that of the
        parameters. Raise ValueError for a bidirectional mixer or a batch size below 1, TypeError for an integer dtype.
        """
        self._require_causal()
        weight = self.in_proj.weight
        target = weight.device if device is None else torch.device(device)
        dtype = dtype or stream_dtype(weight, target)
        return zero_state(batch_size, self.d_inner, self.d_conv, (self.d_inner, self.d_state), dtype, target)

    def _require_causal(self) -> None:
        """Raise ValueError for a bidirectional mixer."""
        if self.bimamba:
            raise ValueError(
                "a bidirectional mixer has no state to carry: its backward direction starts at the end of the video and needs "
                "the future. Run the whole clip at once, or build the mixer with bimamba=False"
            )

    def forward(
        self, hidden: Float[Tensor, "B L D"], state: State | None = None, return_state: bool = False
    ) -> Float[Tensor, "B L D"] | tuple[Float[Tensor, "B L D"], State]:
        """Mix the tokens of hidden (B, L, D). Return (B, L, D), and with `return_state` also the state after the last token.

        With `bimamba=False` a state continues a sequence: chunks that are chained by it give what the whole sequence gives,
        gradients included. The given state is not changed.

        Raise ValueError if a bidirectional mixer is given a state or asked for one, and for a state of another shape or device.
        Raise TypeError for a state of another dtype.
        """
        if state is not None or return_state:
            self._require_causal()
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        if state is not None:
            check_state(state, x, self.d_conv, (self.d_inner, self.d_state), self.layer_idx)
        y, state = self.run_direction(x, z, self.forward_direction, state)
        if self.bimamba:
            y = y + self.run_direction(x, z, self.backward_direction, reverse=True)[0]
        out = self.out_proj(y)
        return (out, state) if return_state else out

    @property
    def forward_direction(self) -> Direction:
        """The parameters of the forward scan."""
        return Direction(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)

    @property
    def backward_direction(self) -> Direction:
        """The parameters of the backward scan."""
        return Direction(self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)

    def run_direction(
        self, x: Tensor, z: Tensor, p: Direction, state: State | None = None, reverse: bool = False
    ) -> tuple[Tensor, State]:
        """Run one direction, of parameters `p`, over a sequence or a chunk of one; x and z are (B, L, E).

        Return the gated output y (B, L, E) and the state after the last token that the direction reads.
        """
        conv_state, ssm_state = state if state is not None else (None, None)
        c, conv_state = causal_conv1d(x, p.conv.weight.squeeze(1), p.conv.bias, initial_state=conv_state, reverse=reverse)
        dt, B, C = p.x_proj(c).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        delta = F.linear(dt, p.dt_proj.weight)  # its bias is added inside the scan, in float32
        A = -torch.exp(p.A_log.to(accumulation_dtype(p.A_log.dtype)))
        y, ssm_state = selective_scan(c, delta, A, B, C, p.D, z, p.dt_proj.bias, initial_state=ssm_state, reverse=reverse)
        return y, (conv_state, ssm_state)
