"""Stand-ins of mamba_ssm and causal_conv1d: loops that are strict about the layouts and dtypes that the kernels demand."""

import sys
from types import ModuleType

import naive
import torch
import torch.nn.functional as F

from fused import backends


def install(monkeypatch):
    """Put the stand-ins in the place of both packages, and let every backend run, for the time of a test."""

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        assert u.shape[2] == B.shape[-1] == C.shape[-1] and u.shape[1] == A.shape[0]
        for x in (u, delta, B, C, z):
            assert x is None or (x.dtype == u.dtype and x.stride(-1) == 1)
        assert all(x is None or x.dtype == torch.float32 for x in (A, D, delta_bias))
        inputs = (x if x is None else x.float().movedim(-1, 1) for x in (u, delta, B, C, z))
        u_, delta_, B_, C_, z_ = inputs
        y, state = naive.scan(u_, delta_, A, B_, C_, D, z_, delta_bias, softplus=delta_softplus)
        y = y.to(u.dtype).transpose(1, 2)
        return (y, state) if return_last_state else y

    def causal_conv1d_fn(x, weight, bias=None, activation=None):
        batch, channel, token = x.stride()
        last = channel == 1 and token > 1
        assert not last or x.shape[1] % 8 == token % 8 == batch % 8 == 0, "channel-last wants multiples of 8"
        assert last or token == 1 or x.shape[2] == 1
        assert 2 <= weight.shape[1] <= 4 and weight.dim() == 2
        up = (None if v is None else v.float() for v in (x.transpose(1, 2), weight, bias))
        y = naive.conv(*up, activation=activation)[0].to(x.dtype).transpose(1, 2)
        return y if last else y.contiguous()  # as x lies

    def norm_fn(kind):
        def run(x, weight, bias, residual=None, eps=1e-6, prenorm=False, residual_in_fp32=False):
            added = None if residual is None else residual.float()
            y, v = naive.norm(x.float(), weight, bias, residual=added, eps=eps, kind=kind)
            stored = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
            return (y.to(x.dtype), v.to(stored)) if prenorm else y.to(x.dtype)

        return run

    def mamba_inner_fn(
        xz, conv_w, conv_b, x_proj, dt_proj, out_proj, out_bias, A, B=None, C=None, D=None, delta_bias=None,
        delta_softplus=True,
    ):  # fmt: skip
        assert xz.stride(-1) == 1 and conv_w.dim() == 3 and A.dtype == D.dtype == delta_bias.dtype == torch.float32
        x, z = xz.chunk(2, dim=1)
        c = naive.conv(x.transpose(1, 2), conv_w.squeeze(1), conv_b)[0]
        dt, B, C = F.linear(c, x_proj).split([dt_proj.shape[1], A.shape[1], A.shape[1]], dim=-1)
        y, _ = naive.scan(c, F.linear(dt, dt_proj), A, B, C, D, z.transpose(1, 2), delta_bias, softplus=delta_softplus)
        assert out_bias is None  # whose gradient it sums to one number
        return F.linear(y, out_proj)

    contents = {
        "mamba_ssm": {},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": {
            "selective_scan_fn": selective_scan_fn,
            "mamba_inner_fn": mamba_inner_fn,
        },
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.layer_norm": {"rms_norm_fn": norm_fn("rms"), "layer_norm_fn": norm_fn("layer")},
        "causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn},
    }
    for name, functions in contents.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(backends, "unavailable", lambda backend, device: None)
