"""Inputs of a selective scan as a model produces them, and the same scan three times, for the rule."""

import naive
import torch
from rule import double, outcome

from fused import selective_scan


def draw(seed, shape, everything=True, state=True, dtype=torch.float32):
    """Return named inputs, and the cotangents of y and final_state; `shape` is (B, L, E, N) or, with groups, (B, L, E, N, G).

    `everything` adds D, z and delta_bias, `state` an initial state.
    """
    batch, length, width, states, groups = (*shape, None)[:5]
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g).to(dtype)

    mixing = (batch, length, states) if groups is None else (batch, length, groups, states)
    tensors = {
        "u": normal(batch, length, width),
        "delta": normal(batch, length, width),
        "A": -torch.rand(width, states, generator=g) * states - 0.1,
        "B": normal(*mixing),
        "C": normal(*mixing),
    }
    if everything:
        tensors |= {"D": normal(width).float(), "z": normal(batch, length, width), "delta_bias": normal(width).float()}
    if state:
        tensors["initial_state"] = normal(batch, width, states).float()
    return tensors, [normal(batch, length, width), normal(batch, width, states).float()]


def sample(tensors, cotangents, backend="auto", **options):
    """Return outcomes of `selective_scan` by a backend, of the loop in float64, and of the loop in at least float32."""
    dtype = torch.promote_types(tensors["u"].dtype, torch.float32)
    return (
        outcome(lambda **x: selective_scan(**x, **options, backend=backend), tensors, cotangents, None),
        outcome(lambda **x: naive.scan(**x, **options), double(tensors), cotangents, torch.float64),
        outcome(lambda **x: naive.scan(**x, **options), tensors, cotangents, dtype),
    )


def draw_pair(seed, shape, dtype=torch.float32, everything=True):
    first, cotangents = draw(seed, shape, everything, state=False, dtype=dtype)
    second, _ = draw(seed + 100, shape, everything, state=False, dtype=dtype)
    second.pop("z", None)
    return first | {f"{k}_b": v for k, v in second.items()}, cotangents[:1]


def split(tensors):
    z = tensors.get("z")
    first = {k: v for k, v in tensors.items() if not k.endswith("_b") and k != "z"}
    return first, {k.removesuffix("_b"): v for k, v in tensors.items() if k.endswith("_b")}, z


def loops(**tensors):
    first, second, z = split(tensors)
    return (naive.scan(**first, z=z)[0] + naive.scan(**second, z=z, reverse=True)[0],)
