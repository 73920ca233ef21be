"""The operators as plain loops in the dtype of their arguments: what the fused ones are compared with."""

import torch
import torch.nn.functional as F


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, *, softplus=True, initial_state=None, reverse=False):
    B, C = (x if x.dim() == 4 else x.unsqueeze(2) for x in (B, C))
    B, C = (x.repeat_interleave(u.shape[2] // x.shape[2], dim=2) for x in (B, C))
    delta = delta if delta_bias is None else delta + delta_bias
    delta = F.softplus(delta) if softplus else delta
    state = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state
    y = [None] * u.shape[1]
    for t in reversed(range(u.shape[1])) if reverse else range(u.shape[1]):
        state = torch.exp(delta[:, t, :, None] * A) * state + (delta[:, t] * u[:, t])[..., None] * B[:, t]
        y[t] = (state * C[:, t]).sum(-1)
    y = torch.stack(y, dim=1)
    y = y if D is None else y + D * u
    return y if z is None else y * F.silu(z), state


def conv(x, weight, bias=None, *, activation="silu", initial_state=None, reverse=False):
    width, length = weight.shape[1], x.shape[1]
    edge = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if initial_state is None else initial_state.transpose(1, 2)
    line = torch.cat([x, edge] if reverse else [edge, x], dim=1)
    y = []
    for t in range(length):
        window = line[:, t : t + width]
        window = window.flip(1) if reverse else window
        y.append((window * weight.T).sum(1) + (0 if bias is None else bias))
    y = torch.stack(y, dim=1)
    state = line[:, : width - 1] if reverse else line[:, length:]
    return y if activation is None else F.silu(y), state.transpose(1, 2)


def scan_of_mixer(s, precision):
    """Return y of the `ScanInputs` of a mixer, by name, in a precision: the sum over directions, with the gate."""
    parts = []
    for i, reverse in enumerate(s.reverses):
        own = {name: getattr(s, name)[i].to(precision) for name in ("u", "delta", "A", "B", "C", "D")}
        parts.append(scan(**own, softplus=False, reverse=reverse)[0])
    return {"y": sum(parts) * F.silu(s.z.to(precision))}


def norm(x, weight, bias=None, *, residual=None, eps=1e-5, kind="rms"):
    v = x if residual is None else x + residual
    centred = v - v.mean(-1, keepdim=True) if kind == "layer" else v
    y = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias, v


def ssd(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, *, softplus=True, dt_limit=(0, float("inf")), initial_state=None,
    seq_idx=None, reverse=False,
):  # fmt: skip
    B, C = (m.repeat_interleave(x.shape[2] // m.shape[2], dim=2) for m in (B, C))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if softplus else dt).clamp(*dt_limit)
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[3]) if initial_state is None else initial_state
    y, before = [None] * x.shape[1], None
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        if before is not None and seq_idx is not None:
            state = state * (seq_idx[:, t] == seq_idx[:, before])[:, None, None, None]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        y[t], before = (state * C[:, t, :, None]).sum(-1), t
    y = torch.stack(y, dim=1)
    y = y if D is None else y + (D if D.dim() == 2 else D[:, None]) * x
    return y if z is None else y * F.silu(z), state
