"""The gated norm of both backends against the formula; native through Triton's interpreter, or on a GPU where there is one."""

import pytest
import torch
import torch.nn.functional as F
from rule import assert_rule, double, outcome

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

from fused.ops.gated_norm import launch  # noqa: E402
from fused.ops.gated_norm.eager import gated_norm_eager  # noqa: E402
from fused.ops.gated_norm.native import gated_norm_native  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter
SEEDS = range(4)


def formula(y, z, weight, *, groups, norm_before_gate):
    v = y if norm_before_gate else y * F.silu(z)
    parts = v.unflatten(-1, (groups, -1))
    v = (parts / torch.sqrt(parts.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2) * weight
    return v * F.silu(z) if norm_before_gate else v


def draw(seed, shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    y, z, dout = (torch.randn(*shape, generator=g).to(DEVICE, dtype) for _ in range(3))
    return {"y": y, "z": z, "weight": 1 + 0.2 * torch.randn(shape[-1], generator=g).to(DEVICE)}, [dout]


def sample(op, seed, shape, dtype=torch.float32, **options):
    tensors, cotangents = draw(seed, shape, dtype)
    return (
        outcome(lambda **x: (op(**x, **options),), tensors, cotangents, None),
        outcome(lambda **x: (formula(**x, **options),), double(tensors), cotangents, torch.float64),
        outcome(lambda **x: (formula(**x, **options),), tensors, cotangents, torch.float32),
    )


@pytest.mark.parametrize("before", [False, True], ids=["gate-first", "norm-first"])
@pytest.mark.parametrize("shape, groups", [((2, 5, 24), 1), ((7, 30), 3)], ids=str)
@pytest.mark.parametrize("op", [gated_norm_eager, gated_norm_native], ids=["torch", "native"])
def test_follows_the_formula(op, shape, groups, before):
    assert_rule(sample(op, seed, shape, groups=groups, norm_before_gate=before) for seed in SEEDS)


def test_more_rows_than_programs(monkeypatch):
    monkeypatch.setattr(launch, "PROGRAMS", 3)
    assert_rule(sample(gated_norm_native, seed, (8, 20), groups=2, norm_before_gate=False) for seed in SEEDS)


def test_low_precision():
    options = {"groups": 2, "norm_before_gate": False}
    assert_rule(sample(gated_norm_eager, seed, (3, 7, 24), torch.bfloat16, **options) for seed in SEEDS)
    got, truth, _ = sample(gated_norm_native, 0, (3, 7, 24), torch.bfloat16, **options)  # the interpreter truncates
    assert all((got[k].double() - truth[k]).norm() <= 2**-6 * truth[k].norm() for k in got)
    assert got["out0"].dtype == got["dz"].dtype == torch.bfloat16 and got["dweight"].dtype == torch.float32


def test_rows_of_a_projection_are_read_in_place():
    tensors, _ = draw(0, (2, 3, 16))
    wide = torch.cat([torch.full_like(tensors["z"], torch.nan), tensors["z"]], -1)
    assert launch.rows(wide[..., 16:]).data_ptr() == wide[..., 16:].data_ptr()
    got = gated_norm_native(tensors["y"], wide[..., 16:], tensors["weight"])
    assert torch.equal(got, gated_norm_native(**tensors))


def test_no_rows_and_no_weight():
    tensors, _ = draw(0, (0, 16))
    assert gated_norm_native(**tensors).shape == (0, 16)
    tensors, _ = draw(0, (3, 16))
    assert torch.equal(gated_norm_eager(tensors["y"], tensors["z"], None), tensors["y"] * F.silu(tensors["z"]))


@pytest.mark.usefixtures("unchecked")
def test_what_native_has_not_is_named():
    wide = torch.ones(1, 8193, device=DEVICE)
    with pytest.raises(ValueError, match=r"groups of at most 8192 channels, got y of shape \(1, 8193\) in 1 groups"):
        gated_norm_native(wide, wide, wide[0])


def test_is_an_op():
    tensors, cotangents = draw(0, (3, 16))
    leaves = [t.requires_grad_() for t in tensors.values()]
    torch.library.opcheck(torch.ops.videomamba.gated_norm.default, (*leaves, 2, False, 1e-5))
    fixed = [t.detach() for t in leaves]
    torch.library.opcheck(torch.ops.videomamba.gated_norm_backward.default, (*fixed, 2, False, 1e-5, cotangents[0]))
