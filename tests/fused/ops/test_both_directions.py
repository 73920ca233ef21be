"""Both directions of a scan in one loop, and the operations that a layer of backend "torch" takes."""

import threading
from collections import Counter

import naive
import pytest
import torch
from rule import assert_rule, double, outcome
from scans import draw, draw_pair, loops, split
from torch.utils._python_dispatch import TorchDispatchMode

from fused import bidirectional_scan, selective_scan
from fused.models.videomamba.block import Block
from fused.models.videomamba.config import VideoMambaConfig
from fused.ops.selective_scan import recurrence

TOKENS = 6  # of a segment in `small_segments`
SHARED = ("A", "D", "delta_bias")
VIEWS = ("view", "select", "slice", "unbind", "permute", "transpose", "expand", "unsqueeze", "alias", "detach", "as_strided",
         "squeeze", "t.default", "split", "promote_types", "flatten", "unflatten", "reshape", "chunk", "mT", "empty",
         "new_empty")  # fmt: skip


def both(**tensors):
    first, second, z = split(tensors)
    return (bidirectional_scan(**{k: (first[k], second[k]) for k in first}, z=z),)


def sample(tensors, cotangents):
    dtype = torch.promote_types(tensors["u"].dtype, torch.float32)
    return (
        outcome(both, tensors, cotangents, None),
        outcome(loops, double(tensors), cotangents, torch.float64),
        outcome(loops, tensors, cotangents, dtype),
    )


@pytest.fixture(autouse=True)
def torch_operations(monkeypatch):
    monkeypatch.setenv("VIDEOMAMBA_DISABLE_FUSED", "1")


@pytest.fixture(params=["steps", "chunks"])
def small_segments(request, monkeypatch):
    """A segment has TOKENS tokens of one clip of E = 4, N = 3, both directions; with "chunks" splits of 2 advance together."""
    monkeypatch.setattr(recurrence, "CPU_STEP", 0 if request.param == "steps" else 10**6)
    monkeypatch.setattr(recurrence, "MAX_STEPS", 2)
    monkeypatch.setattr(recurrence, "CPU_BLOCK", TOKENS * 2 * 4 * 3)


@pytest.mark.parametrize("length", [1, TOKENS - 1, TOKENS, TOKENS + 1, 2 * TOKENS + 1])
@pytest.mark.parametrize("groups", [None, 2])
def test_follows_two_loops_at_the_edges_of_segments(small_segments, length, groups):
    assert_rule(sample(*draw_pair(seed, (2, length, 4, 3, groups))) for seed in range(4))


@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("length", [2 * TOKENS - 1, 2 * TOKENS, 2 * TOKENS + 1, 4 * TOKENS + 1])
def test_one_direction_follows_the_loop_at_the_edges_of_segments(small_segments, reverse, length):
    """A segment of one direction has twice the tokens."""

    def one(seed):
        tensors, cotangents = draw(seed, (2, length, 4, 3, None))
        return (
            outcome(lambda **x: selective_scan(**x, reverse=reverse), tensors, cotangents, None),
            outcome(lambda **x: naive.scan(**x, reverse=reverse), double(tensors), cotangents, torch.float64),
            outcome(lambda **x: naive.scan(**x, reverse=reverse), tensors, cotangents, torch.float32),
        )

    assert_rule(one(seed) for seed in range(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("everything", [False, True], ids=["bare", "everything"])
def test_follows_two_loops_in_any_precision(dtype, everything):
    draws = [draw_pair(seed, (2, 19, 4, 3, None), dtype, everything) for seed in range(4)]
    samples = [sample(*d) for d in draws]
    assert_rule(samples)
    assert all(samples[0][0][f"d{k}"].dtype == x.dtype for k, x in draws[0][0].items())


def test_pairs_of_unlike_groups_are_two_scans():
    tensors, cotangents = draw_pair(0, (2, 9, 4, 3, None))
    tensors["B_b"], tensors["C_b"] = (tensors[k].unsqueeze(2).repeat(1, 1, 2, 1) for k in ("B_b", "C_b"))
    assert_rule([sample(tensors, cotangents)])


def test_a_clip_ignores_its_neighbours(small_segments):
    tensors, cotangents = draw_pair(0, (3, 2 * TOKENS + 1, 4, 3, None))
    alone = {k: v if k.removesuffix("_b") in SHARED else v[1:2] for k, v in tensors.items()}
    together, single = outcome(both, tensors, cotangents, None), outcome(both, alone, [x[1:2] for x in cotangents], None)
    names = [k for k in together if k[1:].removesuffix("_b") not in SHARED]
    assert all(torch.equal(together[k][1:2], single[k]) for k in names)


def test_groups_of_clips_that_do_not_fill_the_last(monkeypatch):
    monkeypatch.setattr(recurrence, "CPU_STEP", 0)
    monkeypatch.setattr(recurrence, "CPU_BLOCK", 8 * 2 * 2 * 4 * 3)  # 8 tokens of two clips of E = 4, N = 3, both directions
    assert recurrence.make_segments(3, 13, 2 * 4 * 3, False)[0] == [slice(0, 2), slice(2, 3)]
    assert_rule(sample(*draw_pair(seed, (3, 13, 4, 3, None))) for seed in range(4))


def test_memory_kept_between_scans_mixes_nothing_up():
    """Threads and `inference_mode` use scratch memory that stays."""
    with torch.inference_mode():
        bidirectional_scan(*[(torch.ones(1, 40, 8), torch.ones(1, 40, 8))] * 2, *[(torch.ones(8, 40),) * 2],
                           *[(torch.ones(1, 40, 40),) * 2] * 2)  # fmt: skip
    draws = [draw_pair(seed, (1, 300, 16, 8, None)) for seed in range(4)]
    expected = [outcome(both, *d, None) for d in draws]
    results = {}

    def run(i):
        for _ in range(3):
            results[i] = outcome(both, *draws[i], None)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i][k], expected[i][k]) for i in range(4) for k in expected[i])


class Count(TorchDispatchMode):
    """Operations that compute, by name; the largest tensor that `exp` took; multiply-adds along channels with a stride."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest_exp, self.strided = Counter(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not name.startswith(VIEWS):
            self.calls[name] += 1
        if name.startswith("exp.") or name.startswith("exp_."):
            self.largest_exp = max(self.largest_exp, args[0].numel())
        if name.startswith("addcmul_"):
            self.strided += any(x.stride(-1) != 1 for x in args if x.dim() and x.shape[-1] > 1)
        return function(*args, **kwargs or {})


def counts(length):
    """Return the operations of a layer of a tiny model over `length` tokens: forward without gradients, and backward."""
    torch.manual_seed(0)
    layer = Block(VideoMambaConfig.tiny(), 1, 0.0, backend="torch").eval()
    tokens, residual = torch.randn(2, 1, length, 192)
    with torch.no_grad():
        layer(tokens, residual)  # what depends on the length alone is made once
        with Count() as forward:
            layer(tokens, residual)
    hidden, residual, _ = layer(tokens.requires_grad_(), residual)
    with Count() as backward:
        torch.autograd.backward([hidden, residual], [torch.ones_like(hidden), torch.ones_like(residual)])
    return forward, backward


def test_a_layer_takes_few_operations():
    """Short clips wait for the start of operations; longer ones for exponentials and for strided memory."""
    (short, short_backward), (long, long_backward) = counts(17), counts(34)
    assert short.calls.total() <= 62, short.calls
    assert short_backward.calls.total() <= 121, short_backward.calls
    assert long.calls.total() - short.calls.total() <= 17
    assert long_backward.calls.total() - short_backward.calls.total() <= 2 * 17
    assert max(x.largest_exp for x in (long, long_backward)) <= 2 * 384 * 16  # of A alone, not of every token
    assert not long.strided and not long_backward.strided


def test_a_training_computes_the_inputs_of_several_segments_at_once():
    """170 tokens are two segments."""
    _, backward = counts(170)
    assert backward.calls["softplus.out"] == 1 and backward.calls["exp2_.default"] == 2, backward.calls


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_sums_over_states_keep_their_precision(precision):
    """A precision that is lowered for matrix products is not that of the scan, which then takes no products."""
    tensors, cotangents = draw_pair(0, (1, 5, 4, 3, None))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with Count() as count:
            got = sample(tensors, cotangents)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_rule([got])
    assert any(name.startswith(("bmm", "mm")) for name in count.calls) == (precision == "highest"), count.calls
