"""The mixer of backend "torch" on a CPU, which goes segment by segment, against plain loops over its tokens."""

import copy
from concurrent.futures import ThreadPoolExecutor

import naive
import pytest
import torch
import torch.nn.functional as F
from rule import assert_rule
from torch.utils.checkpoint import checkpoint

from fused.modules.mamba import Mamba
from fused.ops.mamba_inner import segments
from fused.ops.selective_scan import recurrence
from fused.runtime.scratch import Scratch

D_MODEL, STATES = 8, 3
TOKENS = 6  # of a segment
ROW = 2 * 2 * D_MODEL * STATES


def loops(mixer, tokens):
    """Return what the mixer does, by the loops of `naive`."""
    x, z = mixer.in_proj(tokens).chunk(2, dim=-1)
    y = 0
    for reverse, w in zip((False, True), mixer.directions(), strict=True):
        c, _ = naive.conv(x, w.conv, w.conv_bias, reverse=reverse)
        dt, B, C = F.linear(c, w.x_proj).split((w.dt_proj.shape[1], STATES, STATES), dim=-1)
        y = y + naive.scan(c, F.linear(dt, w.dt_proj), -w.A.exp(), B, C, w.D, z, w.dt_bias, reverse=reverse)[0]
    return mixer.out_proj(y)


def draw(seed, clips, length, **options):
    torch.manual_seed(seed)
    mixer = Mamba(D_MODEL, d_state=STATES, backend="torch", **options)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer, *torch.randn(2, clips, length, D_MODEL)


def outcome(call, mixer, tokens, cotangent):
    leaves = [tokens.detach().clone().requires_grad_(), *mixer.parameters()]
    out = call(leaves[0])
    grads = torch.autograd.grad(out, leaves, cotangent.to(out.dtype))
    names = ["tokens", *(name for name, _ in mixer.named_parameters())]
    return {"out": out.detach()} | {f"d{name}": g for name, g in zip(names, grads, strict=True)}


def sample(seed, clips, length, dtype=torch.float32, **options):
    mixer, tokens, cotangent = draw(seed, clips, length, **options)
    exact = copy.deepcopy(mixer).double()
    plain = outcome(lambda x: loops(mixer, x), mixer, tokens, cotangent)
    mixer, tokens = (exact, tokens.double()) if dtype == torch.float64 else (mixer, tokens)
    got = outcome(mixer, mixer, tokens, cotangent)
    with torch.no_grad():
        inference = mixer(tokens)
    return (
        {**got, "inference": inference},
        *({**x, "inference": x["out"]} for x in (outcome(lambda x: loops(exact, x), exact, tokens.double(), cotangent), plain)),
    )


@pytest.fixture(params=["steps", "splits"])
def small_segments(request, monkeypatch):
    """A segment has TOKENS tokens of one clip, a group two segments; with "splits" some advance together."""
    monkeypatch.setattr(recurrence, "CPU_STEP", 10**6 if request.param == "splits" else 0)
    monkeypatch.setattr(recurrence, "MAX_STEPS", 2)
    monkeypatch.setattr(segments, "GROUP", 2)
    monkeypatch.setattr(recurrence, "CPU_BLOCK", TOKENS * ROW)


@pytest.mark.parametrize("length", [1, 2, TOKENS - 1, TOKENS, TOKENS + 1, 2 * TOKENS + 1, 4 * TOKENS + 1])
def test_follows_the_loops_at_the_edges_of_segments(small_segments, length):
    assert_rule(sample(seed, 2, length) for seed in range(4))


@pytest.mark.parametrize("options", [{"conv_bias": False}, {"d_conv": 2}, {"d_conv": 1}, {"bias": True}, {"dt_rank": 3}])
def test_follows_the_loops_with_other_weights(options):
    assert_rule(sample(seed, 3, 19, **options) for seed in range(4))


def test_follows_the_loops_in_float64():
    assert_rule([sample(0, 2, 19, torch.float64)])


@pytest.mark.parametrize("number", [0, 1])
def test_sequences_without_clips_or_tokens(number):
    """A batch of none has an output of none, and gradients of zero for the weights."""
    mixer, tokens, _ = draw(0, number, 1 - number)
    out = mixer(tokens.requires_grad_())
    out.sum().backward()
    assert out.shape == tokens.shape and not any(p.grad.any() for p in mixer.parameters())


@pytest.mark.parametrize("frozen", ["conv1d", "x_proj", "dt_proj_b", "A_log", "D_b"])
def test_frozen_weights_leave_the_other_gradients_alone(frozen):
    mixer, tokens, cotangent = draw(0, 1, 9)
    mixer(tokens).backward(cotangent)
    expected = {name: p.grad for name, p in mixer.named_parameters()}
    mixer.zero_grad()
    for name, p in mixer.named_parameters():
        p.requires_grad_(not name.startswith(frozen + ".") and name != frozen)
    mixer(tokens).backward(cotangent)
    for name, p in mixer.named_parameters():
        assert torch.equal(p.grad, expected[name]) if p.requires_grad else p.grad is None


def test_a_second_backward_gives_the_same_bits(small_segments):
    mixer, tokens, cotangent = draw(0, 2, 2 * TOKENS + 1)
    out = mixer(tokens)
    first, second = (torch.autograd.grad(out, list(mixer.parameters()), cotangent, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_weights_that_change_before_the_backward_do_not_change_it():
    mixer, tokens, cotangent = draw(0, 1, 9)
    expected = torch.autograd.grad(mixer(tokens), [mixer.A_log, mixer.D], cotangent)
    out = mixer(tokens)
    with torch.no_grad():
        mixer.x_proj.weight.mul_(2)
        mixer.dt_proj.bias.add_(1)
    assert all(map(torch.equal, torch.autograd.grad(out, [mixer.A_log, mixer.D], cotangent), expected))


def test_weights_that_changed_are_read_again():
    """Also those that were written through `.data`, which leaves no trace in a tensor's version."""
    mixer, tokens, _ = draw(0, 1, 9)
    with torch.no_grad():
        mixer(tokens)
        for p in mixer.parameters():
            p.data.mul_(1.5)
        changed = mixer(tokens)
        assert torch.equal(changed, copy.deepcopy(mixer)(tokens))


def kept_bytes(length):
    """Return the bytes that a mixer of E = 64 and N = 16 saves for its backward, the weights and its input left out."""
    mixer = Mamba(32, backend="torch")
    found = {}

    def note(x):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = mixer(torch.randn(1, length, 32, requires_grad=True))
    assert out.requires_grad
    return sum(found.values())


def test_memory_kept_for_the_backward_is_bounded():
    """A long sequence keeps six tensors of the layer's width, where the states of its tokens alone would be 32 of them."""
    lengths = [4096, 8192]
    more = kept_bytes(lengths[1]) - kept_bytes(lengths[0])
    assert more <= 6 * 4 * 64 * (lengths[1] - lengths[0])


def test_memory_that_a_thread_keeps_does_not_grow_with_the_sequence(small_segments):
    sizes = []

    def note():
        for length in (8 * TOKENS, 32 * TOKENS):
            mixer, tokens, cotangent = draw(0, 1, length)
            mixer(tokens).backward(cotangent)
            sizes.append({name: kept.flat.numel() for name, kept in Scratch(tokens).memory.items()})

    with ThreadPoolExecutor(1) as pool:  # a new thread has no memory yet
        pool.submit(note).result()
    assert sizes[0] == sizes[1] and sizes[0].keys() >= {"states", "c", "dw"}


def test_recomputation_in_the_backward_gives_the_same_bits():
    mixer, tokens, cotangent = draw(0, 2, 40)
    expected = torch.autograd.grad(mixer(tokens), list(mixer.parameters()), cotangent)
    out = checkpoint(mixer, tokens, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(out, list(mixer.parameters()), cotangent), expected))


def test_threads_do_not_share_scratch_memory(small_segments):
    draws = [draw(seed, 2, 2 * TOKENS + seed) for seed in range(4)]
    expected = [outcome(mixer, mixer, *rest) for mixer, *rest in draws]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda d: outcome(d[0], *d), draws * 3))
    for got, wanted in zip(results, expected * 3, strict=True):
        assert all(torch.equal(got[k], wanted[k]) for k in wanted)
