"""mamba-ssm's own cases for its selective scan, within mamba-ssm's own tolerances against float32; needs a GPU.

Lengths, options and tolerances are those of tests/ops/test_selective_scan.py of mamba-ssm 2.3 as far as this signature
carries them: B and C depend on the input, and A is real.
"""

import itertools

import pytest
import torch

from fused import backends, selective_scan
from fused.ops.selective_scan.eager import selective_scan_eager

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
TOLERANCES = {torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}
# gradient: multiples of (rtol, atol), of the streams' tolerance or of the weights'
STREAMS = {"u": (2, 2), "delta": (5, 10), "B": (1, 1), "C": (1, 1)}
WEIGHTS = {"A": (1, 5), "D": (1, 1), "z": (1, 1), "delta_bias": (1, 1)}
OPTIONS = list(itertools.product((1, 2), (False, True), (False, True), (False, True)))


@pytest.fixture(autouse=True)
def native():
    if reason := backends.unavailable("native", "cuda"):
        pytest.skip(reason)


def draw(length, dtype, groups, everything):
    """mamba-ssm's draws: two clips of 4 channels a group, 8 states, delta in [0, 0.5)."""
    has_z, has_D, has_bias = everything
    g = torch.Generator("cuda").manual_seed(0)
    batch, width, states = 2, 4 * groups, 8

    def normal(*size, of=dtype):
        return torch.randn(*size, generator=g, device="cuda", dtype=of)

    tensors = {
        "u": normal(batch, length, width),
        "delta": 0.5 * torch.rand(batch, length, width, generator=g, device="cuda").to(dtype),
        "A": -0.5 * torch.rand(width, states, generator=g, device="cuda"),
        "B": normal(batch, length, groups, states), "C": normal(batch, length, groups, states),
    }  # fmt: skip
    tensors |= {"D": normal(width, of=torch.float32)} if has_D else {}
    tensors |= {"z": normal(batch, length, width)} if has_z else {}
    tensors |= {"delta_bias": 0.5 * torch.rand(width, generator=g, device="cuda")} if has_bias else {}
    return tensors, normal(batch, length, width)


def run(tensors, dy, softplus, **backend):
    leaves = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    y, state = (selective_scan if backend else selective_scan_eager)(**leaves, softplus=softplus, **backend)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return y, state, dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_mamba_ssms_cases(length, dtype):
    rtol, atol = TOLERANCES[dtype]
    for groups, softplus, has_z, has_rest in OPTIONS:
        tensors, dy = draw(length, dtype, groups, (has_z, has_rest, has_rest))
        y, state, grads = run(tensors, dy, softplus, backend="native")
        y2, state2, grads2 = run({k: v.float() for k, v in tensors.items()}, dy, softplus)
        case = f"G={groups} softplus={softplus} z={has_z} D, bias={has_rest}"
        weights = (max(1e-3, rtol), max(1e-3, atol)) if has_z else (1e-3, 1e-3)
        torch.testing.assert_close(y.float(), y2, rtol=rtol, atol=atol, msg=lambda m, c=case: f"{c}: y: {m}")
        torch.testing.assert_close(state, state2, rtol=rtol, atol=atol, msg=lambda m, c=case: f"{c}: state: {m}")
        for name, grad in grads.items():
            (r, a), (base_r, base_a) = (STREAMS | WEIGHTS)[name], (rtol, atol) if name in STREAMS else weights
            close = {"rtol": r * base_r, "atol": a * base_a}
            said = f"{case}: d{name}"
            torch.testing.assert_close(grad.float(), grads2[name], **close, msg=lambda m, s=said: f"{s}: {m}")
