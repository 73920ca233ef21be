"""The native step sizes against the formula: through Triton's interpreter, or on a GPU where there is one."""

import pytest
import torch
from rule import assert_rule

pytest.importorskip("triton")

import compiled  # noqa: E402

from fused.ops.mamba_inner.kernels import dt_proj_softplus  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter


def sample(seed, directions, tokens, R, E, dtype=torch.float32):
    """(native, in float64, in float32 rounded once) of one draw, with steps from 1e-9 to 100."""
    g = torch.Generator().manual_seed(seed)
    rows, weights = (torch.randn(directions, *size, generator=g).to(dtype) for size in ((tokens, R + 3), (R, E)))
    biases = torch.linspace(-20, 100, E).repeat(directions, 1)

    def formula(dtype):
        dt, W, b = (x.to(dtype) for x in (rows[..., :R], weights, biases))
        raw = dt @ W + b[:, None]
        return {"delta": torch.logaddexp(raw, torch.zeros_like(raw))}

    got = dt_proj_softplus(rows.to(DEVICE), weights.to(DEVICE), [b.to(DEVICE) for b in biases])
    return {"delta": got.cpu()}, formula(torch.float64), {"delta": formula(torch.float32)["delta"].to(dtype)}


@pytest.mark.parametrize("sizes", [(1, 1, 8, 3), (2, 70, 16, 40), (2, 65, 40, 130), (1, 0, 8, 8)], ids=str)
def test_follows_the_formula(sizes):
    samples = [sample(seed, *sizes) for seed in range(4)]
    if sizes[1]:
        assert_rule(samples)
    assert samples[0][0]["delta"].shape == (sizes[0], sizes[1], sizes[3])


def test_every_step_is_one_rounding_and_a_hundred_thousandth_off_in_half_precision():
    got, truth, _ = (found["delta"].double() for found in sample(0, 2, 70, 40, 130, torch.float16))
    normal = truth >= torch.finfo(torch.float16).tiny
    off = ((got - truth).abs() / truth)[normal]
    assert normal.sum() > 10_000 and off.max() <= torch.finfo(torch.float16).eps / 2 + 1e-5


@pytest.mark.parametrize("sizes", [(1, 3, 136, 40), (2, 130, 144, 130)], ids=str)
def test_a_wide_rank_follows_the_formula_in_half_precision(sizes):
    assert_rule(sample(seed, *sizes, dtype=torch.float16) for seed in range(4))


def test_compiles_without_spills(capsys):
    lines = compiled.compile_in_subprocess("steps")
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert {line["sm"] for line in lines} == {80, 90, 100}
    compiled.assert_no_spills(lines)
