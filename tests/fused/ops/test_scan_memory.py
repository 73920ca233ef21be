"""Where the tensors of the scan's CUDA kernels lie, and how many blocks share out their channels: emulated on the CPU."""

import emulation
import pytest
import torch
from rule import assert_rule, outcome
from scans import draw, sample

import fused.ops.selective_scan.native  # noqa: F401 (registers the operators)
from fused import bidirectional_scan, selective_scan
from fused.ops.selective_scan import schedule

pytestmark = pytest.mark.usefixtures("emulated")
PAIRED = ("u", "delta", "A", "B", "C", "D", "delta_bias")


def native(**tensors):
    return selective_scan(**tensors, backend="native")


def both(tensors):
    """Two directions, whose second of every pair ends with _b."""
    pairs = {k: (tensors[k], tensors[k + "_b"]) for k in PAIRED}
    return [bidirectional_scan(**pairs, z=tensors["z"], backend="native")]


def drawn_pair(shape):
    (tensors, (dy, _)), (other, _) = (draw(seed, shape, state=False) for seed in (0, 1))
    return tensors | {k + "_b": v for k, v in other.items() if k in PAIRED}, dy


@pytest.mark.parametrize("shape", [(2, 17, 80, 16), (1, 16, 48, 16), (1, 32, 32, 4)], ids=str)
def test_channels_of_several_blocks_and_of_a_part_of_one(shape):
    assert_rule(sample(*draw(seed, shape), "native") for seed in range(4))


def test_no_tokens_have_gradients():
    tensors, cotangents = draw(0, (2, 0, 6, 4))
    found = outcome(native, tensors, cotangents, None)
    assert torch.equal(found["dinitial_state"], cotangents[1])
    for name in ("A", "D", "delta_bias"):
        assert torch.equal(found[f"d{name}"], torch.zeros_like(tensors[name])), name
    assert all(found[f"d{name}"].shape == tensors[name].shape for name in tensors)


def test_a_pair_of_other_strides_and_misaligned_views_change_no_bit():
    tensors, dy = drawn_pair((2, 20, 8, 4))
    whole = outcome(lambda **x: both(x), tensors, [dy], None)

    def apart(x):  # behind other channels, and no multiple of four elements from where memory begins
        return torch.cat((torch.full((*x.shape[:-1], 5), torch.nan), x), -1)[..., 5:]

    def odd(x):
        return torch.cat((x.new_full((1,), torch.nan), x.flatten()))[1:].view(x.shape)

    for place, names in ((apart, ("u_b", "delta_b", "B_b")), (odd, tuple(tensors))):
        found = outcome(lambda place=place, names=names, **x: both(x | {n: place(x[n]) for n in names}), tensors, [dy], None)
        assert [name for name in whole if not torch.equal(found[name], whole[name])] == [], place.__name__
    found = outcome(lambda **x: both(x), tensors, [odd(dy)], None)
    assert [name for name in whole if not torch.equal(found[name], whole[name])] == []


class Fenced(torch.autograd.Function):
    """A tensor in fenced memory."""

    @staticmethod
    def forward(ctx, x, at_end):
        return emulation.fenced(x, at_end)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("shape", [(2, 17, 80, 16), (2, 17, 5, 3), (1, 17, 8, 5), (1, 120, 2, 4)], ids=str)
def test_nothing_is_read_or_written_beside_tensors_and_scratch(shape, at_end, monkeypatch):
    """120 tokens are 8 tiles, in splits of 3."""
    tensors, cotangents = draw(0, shape)
    if shape[1] == 120:
        chosen, splits = schedule.make_schedule.__wrapped__, schedule.SplitSchedule(1, 0, 3, 3)
        cut = lambda *a, **k: chosen(*a, **k)._replace(fwd_schedule=splits, bwd_schedule=splits)  # noqa: E731
        monkeypatch.setattr(schedule, "make_schedule", cut)
    due = outcome(native, tensors, cotangents, None)

    def fenced(allocate):
        def allocated(*arguments, **options):
            x = allocate(*arguments, **options)
            return emulation.fenced(x, at_end) if x.numel() else x

        return allocated

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "zeros"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, fenced(getattr(owner, name)))
    cotangents = [emulation.fenced(x, at_end) for x in cotangents]
    found = outcome(lambda **x: native(**{k: Fenced.apply(v, at_end) for k, v in x.items()}), tensors, cotangents, None)
    assert [name for name in due if not torch.equal(found[name], due[name])] == []


@pytest.mark.parametrize("order", ["reverse", "random:1", "random:2"])
def test_directions_meet_in_any_order_of_threads(order, monkeypatch):
    tensors, dy = drawn_pair((1, 40, 40, 16))
    first = outcome(lambda **x: both(x), tensors, [dy], None)
    monkeypatch.setenv("EMULATION_ORDER", order)
    found = outcome(lambda **x: both(x), tensors, [dy], None)
    assert [name for name in first if not torch.equal(found[name], first[name])] == []
