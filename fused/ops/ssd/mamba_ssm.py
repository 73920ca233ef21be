"""Adapter of mamba-ssm's `mamba_chunk_scan_combined` to this package's signature.

Nothing is imported before the first call. Upstream scans from the first token only, so `reverse` flips before and after. It
lets an initial state continue segment 0 only, so the segments of each row are numbered from 0 here. Its 32-bit offsets limit
what it can address. Written against mamba-ssm 2.3.2.
"""

import math
from typing import Any

from torch import Tensor

CHUNK = 256


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, *, softplus: bool = True, dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None, seq_idx: Tensor | None = None, reverse: bool = False, final: bool = True,
) -> tuple[Tensor, Any]:  # fmt: skip
    """Scan by mamba-ssm's Triton kernels: x, z and y (B, L, H, P), the state (B, H, P, N) in float32 (None without `final`)."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def in_order(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.flip(1) if reverse else t

    ids = in_order(seq_idx)
    if ids is not None:
        ids = (ids - ids[:, :1]).abs().int()  # abs: flipped, they descend
    found = mamba_chunk_scan_combined(
        in_order(x), in_order(dt), A.float(), in_order(B), in_order(C), CHUNK, D=D, z=in_order(z),
        dt_bias=None if dt_bias is None else dt_bias.float(), initial_states=initial_state, seq_idx=ids, dt_softplus=softplus,
        dt_limit=dt_limit, return_final_states=final,
    )  # fmt: skip
    y, state = found if final else (found, None)
    return y.flip(1) if reverse else y, None if state is None else state.float()


def convolve_segments(xBC: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor) -> Tensor:
    """Return silu(conv(xBC)) (B, L, E) of segments by causal-conv1d; weight is (E, K)."""
    from causal_conv1d import causal_conv1d_fn

    rows = xBC if xBC.stride(1) % 8 == 0 and xBC.shape[2] % 8 == 0 else xBC.contiguous()
    return causal_conv1d_fn(rows.transpose(1, 2), weight, bias, seq_idx=seq_idx.int(), activation="silu").transpose(1, 2)


def gated_norm(
    y: Tensor, z: Tensor, weight: Tensor, *, groups: int = 1, norm_before_gate: bool = False, eps: float = 1e-5
) -> Tensor:
    """Return the gated norm of y and z (..., E) by mamba-ssm's Triton kernel."""
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    size = y.shape[-1] // groups
    return rmsnorm_fn(y, weight, None, z=z, eps=eps, group_size=size, norm_before_gate=norm_before_gate)


def split_conv_scan(zxbcdt: Tensor, mixer: Any, seq_idx: Tensor | None) -> Tensor:
    """Return what a mixer's out_proj multiplies, (B, L, d_inner), by `mamba_split_conv1d_scan_combined`.

    `mixer` is a `fused.Mamba2`. Its backward computes convolution and scan again.
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    D = mixer.D.unflatten(0, (-1, mixer.headdim)) if mixer.D_has_hdim else mixer.D
    ids = None if seq_idx is None else seq_idx.int()
    norm = {} if mixer.norm is None else {"rmsnorm_weight": mixer.norm.weight, "rmsnorm_eps": mixer.norm.eps}
    return mamba_split_conv1d_scan_combined(
        zxbcdt, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, mixer.dt_bias.float(), -mixer.A_log.float().exp(), D, CHUNK,
        seq_idx=ids, dt_limit=mixer.dt_limit, activation="silu", headdim=None if mixer.D_has_hdim else mixer.headdim,
        ngroups=mixer.ngroups, norm_before_gate=mixer.norm_before_gate, **norm,
    )  # fmt: skip
