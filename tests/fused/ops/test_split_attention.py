"""The attention of few queries to many keys, through Triton's interpreter, or on a GPU where there is one."""

import compiled
import pytest
import torch
from rule import assert_rule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

from fused.ops.split_attention import launch  # noqa: E402
from fused.ops.split_attention.native import split_attention, takes  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter


def draw(seed, batch, groups, rows, keys, channels, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, groups, rows, channels), (batch, groups, keys, channels), (batch, groups, keys, channels)
    return [torch.randn(*shape, generator=g).to(DEVICE, dtype) for shape in shapes]


def formula(q, k, v):
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def sample(*tensors):
    got, plain = split_attention(*tensors), formula(*(t.float() for t in tensors)).to(tensors[0].dtype)
    return {"out": got}, {"out": formula(*(t.double() for t in tensors))}, {"out": plain}


@pytest.mark.parametrize("splits", [1, 2, 7, 128])
@pytest.mark.parametrize("sizes", [(2, 2, 7, 300, 16), (1, 3, 1, 65, 24), (1, 1, 33, 64, 128)], ids=str)
def test_follows_the_formula(sizes, splits, monkeypatch):
    monkeypatch.setattr(launch, "MAX_SPLITS", splits)
    assert_rule(sample(*draw(seed, *sizes)) for seed in range(4))


def test_large_scores_and_one_dominant_key():
    q, k, v = draw(0, 1, 2, 3, 200, 16)
    got = split_attention(200 * q, k, v)
    assert got.isfinite().all()
    torch.testing.assert_close(got, formula(200 * q, k, v))


def test_low_precision_and_strided_keys():
    """Keys as a projection gives them: (B, M, G, C) in memory."""
    q, k, v = draw(0, 2, 2, 7, 300, 16, torch.bfloat16)
    k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    got = split_attention(q, k, v)
    assert got.dtype == torch.bfloat16
    due = formula(q.double(), k.double(), v.double())
    assert (got.double() - due).norm() <= 2**-6 * due.norm()  # the interpreter truncates
    assert torch.equal(got, split_attention(q, k.contiguous(), v.contiguous()))


def test_bits_of_a_row_do_not_depend_on_the_batch():
    q, k, v = draw(0, 3, 2, 7, 300, 16)
    whole = split_attention(q, k, v)
    alone = torch.cat([split_attention(*(t[i : i + 1] for t in (q, k, v))) for i in range(3)])
    assert torch.equal(whole, alone)


def test_one_video_is_read_by_all_rows_without_copies():
    q, k, v = draw(0, 3, 2, 7, 300, 16)
    got = split_attention(q, *(t[:1].expand(3, -1, -1, -1) for t in (k, v)))
    torch.testing.assert_close(got, formula(q, k[:1], v[:1]))


def test_what_the_kernels_are_for():
    q, k, v = draw(0, 1, 1, 4, 1024, 16)
    assert takes(q, k, v)
    assert not takes(q.requires_grad_(), k, v)
    with torch.no_grad():
        assert takes(q, k, v)
        assert not takes(q.repeat(1, 1, 17, 1), k, v)
        assert not takes(q, k[:, :, :1000], v[:, :, :1000])
        assert not takes(q.double(), k.double(), v.double())
        assert not takes(q, k.transpose(2, 3).contiguous().transpose(2, 3), v)


def test_the_native_model_runs_it(monkeypatch):
    """One query of grouped heads to a long video, where no gradient is wanted; also row by row with padding."""
    from fused.models.vamba.attention import attend
    from fused.models.vamba.pattern import Pattern, Span

    q, k, v = draw(0, 2, 2, 3, 1100, 16)
    q = q.reshape(2, 6, 1, 16)
    due = attend(q, k, v, Pattern(), "torch")
    torch.testing.assert_close(attend(q, k, v, Pattern(), "native"), due)
    calls = []
    monkeypatch.setattr("fused.ops.split_attention.native.split_attention", lambda *a: calls.append(1) or split_attention(*a))
    spans = Pattern(spans=(Span(0, slice(0, 1), slice(0, 1100)), Span(1, slice(0, 1), slice(0, 1030))))
    torch.testing.assert_close(attend(q, k, v, spans, "native"), attend(q, k, v, spans, "torch"))
    assert len(calls) == 2


def test_the_kernels_compile_for_gpus_without_spills():
    """They also leave room for two programs a multiprocessor in bfloat16."""
    lines = compiled.compile_in_subprocess("split_attention")
    assert {(x["kernel"], x["sm"]) for x in lines} == {(k, sm) for k in ("split_kernel", "join_kernel") for sm in (80, 90, 100)}
    compiled.assert_no_spills(lines)
    one_token = [x for x in lines if x["kernel"] == "split_kernel" and x["case"] == "R7 C128 bf16" and x["sm"] == 90]
    assert one_token and all(x["shared"] <= 114_000 and x["registers"] * 32 * x["warps"] <= 32_768 for x in one_token)
