"""The causal convolution over rows of several segments, in both packages."""

import importlib

import pytest
import torch

LENGTHS = (1, 4, 2, 6)
IDS = torch.repeat_interleave(torch.tensor([2, 3, 7, 8]), torch.tensor(LENGTHS))[None]


@pytest.fixture(params=["reference", "fused"])
def conv(request: pytest.FixtureRequest):
    return importlib.import_module(request.param).causal_conv1d


def draw(K, dtype=torch.float64):
    g = torch.Generator().manual_seed(K)
    return [torch.randn(*s, generator=g, dtype=dtype).requires_grad_() for s in ((1, 13, 3), (3, K), (3,), (1, 3, K - 1))]


@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("K", [1, 2, 4, 6])
def test_segments_equal_each_alone(conv, K, reverse):
    x, weight, bias, before = leaves = draw(K)
    y, state = conv(x, weight, bias, initial_state=before, seq_idx=IDS, reverse=reverse)
    order = range(len(LENGTHS))[:: -1 if reverse else 1]
    parts, outs = x.split(LENGTHS, 1), {}
    for i in order:  # the state enters the first segment in the order of the scan, and the last one's leaves
        first = before if i == order[0] else None
        outs[i], last = conv(parts[i], weight, bias, initial_state=first, reverse=reverse)
    alone = torch.cat([outs[i] for i in sorted(outs)], 1)
    torch.testing.assert_close(y, alone)
    torch.testing.assert_close(state, last)
    grads = (torch.autograd.grad(a.square().sum() + b.sum(), leaves) for a, b in ((y, state), (alone, last)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_one_segment_is_none(conv):
    x, weight, bias, before = draw(4, torch.float32)
    ids = torch.full((1, 13), 5, dtype=torch.int32)
    got = conv(x.bfloat16(), weight, bias, initial_state=before.bfloat16(), seq_idx=ids)
    want = conv(x.bfloat16(), weight, bias, initial_state=before.bfloat16())
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_named():
    from fused import causal_conv1d

    x, weight, bias, _ = draw(4)
    with pytest.raises(ValueError, match="causal_conv1d: seq_idx must ascend in every row, got 8 and then 2 at token 12"):
        causal_conv1d(x, weight, bias, seq_idx=torch.cat((IDS[:, 1:], IDS[:, :1]), 1))
    with pytest.raises(TypeError, match="seq_idx must be int32 or int64, got torch.bool"):
        causal_conv1d(x, weight, bias, seq_idx=IDS > 3)
