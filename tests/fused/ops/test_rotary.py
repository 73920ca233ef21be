"""The rotation of heads, through Triton's interpreter, or on a GPU where there is one."""

import pytest
import torch
from rule import assert_rule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

from fused.models.vamba.rotary import rotary_angles, rotate  # noqa: E402
from fused.ops.rotary.native import rotary, takes  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter


def draw(seed, dtype=torch.float32):
    """Heads as a projection gives them, (B, L, H, C) in memory, and positions of three axes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 3, 12, generator=g).to(DEVICE, dtype).transpose(1, 2)
    return x, torch.randint(0, 400, (3, 2, 5), generator=g).to(DEVICE)


def angles(positions, dtype):
    return rotary_angles(positions, (3, 2, 1), 1e4, dtype)


def formula(x, positions, dtype):
    cos, sin = (torch.cat((t, t), -1) for t in angles(positions, dtype))
    first, second = x.to(dtype).chunk(2, dim=-1)
    return x.to(dtype) * cos + torch.cat((-second, first), -1) * sin


def sample(seed):
    x, positions = draw(seed)
    got, plain = rotary(x, *angles(positions, torch.float32)), formula(x, positions, torch.float32)
    return {"out": got}, {"out": formula(x, positions, torch.float64)}, {"out": plain}


def test_follows_the_formula():
    assert_rule(sample(seed) for seed in range(4))


def test_low_precision_is_rounded_once():
    x, positions = draw(0, torch.bfloat16)
    got = rotate(x, angles(positions, torch.float32), "native")
    due = formula(x, positions, torch.float64)
    assert got.dtype == torch.bfloat16 and got.is_contiguous()
    assert (got.double() - due).abs().max() <= 2**-7 * due.abs().max()  # the interpreter truncates
    rounded = rotate(x, angles(positions, torch.float32), "torch")
    assert (rounded.double() - due).abs().max() <= 2**-8 * due.abs().max()


def test_what_the_kernel_is_for():
    x, positions = draw(0)
    assert takes(x, *angles(positions, torch.float32))
    assert not takes(x, *angles(positions, torch.float64))
    assert not takes(x.double(), *angles(positions, torch.float32))
    cos, sin = angles(positions, torch.float32)
    assert not takes(x, cos.mT.contiguous().mT, sin) and not takes(x, cos, sin.mT.contiguous().mT)
    assert not takes(x.detach().requires_grad_(), *angles(positions, torch.float32))
    assert not takes(x.transpose(2, 3).contiguous().transpose(2, 3), *angles(positions, torch.float32))
