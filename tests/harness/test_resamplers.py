"""The rivals of BIMBA's compressor: what each computes, and that the race times all of them."""

import pytest
import torch
import torch.nn.functional as F

from harness.baselines.resamplers import PerceiverResampler, Pooling, SelfAttention
from harness.bench import grids, workloads
from harness.judge.registry import subjects
from harness.subjects import bimba

RIVALS = {"pooling", "perceiver", "attention-sdpa", "attention-naive"}


def drawn(*shape):
    B, F_, H, W, G, Q, D = shape
    return torch.randn(B, F_, H, W, D), torch.randn(B, G, Q, D)


def test_pooling_is_the_mean_of_frames_and_windows():
    tokens, queries = drawn(2, 4, 4, 6, 2, 6, 8)
    due = tokens.view(2, 2, 2, 2, 2, 3, 2, 8).mean((2, 4, 6)).view(2, 2, 6, 8)
    torch.testing.assert_close(Pooling()(tokens, queries), due)
    tokens, queries = drawn(1, 1, 3, 3, 1, 4, 8)
    x = tokens[0, 0]
    due = torch.stack((x[:2, :2].mean((0, 1)), x[:2, 2].mean(0), x[2, :2].mean(0), x[2, 2]))  # smaller at the border
    torch.testing.assert_close(Pooling()(tokens, queries)[0, 0], due)


@pytest.mark.parametrize("kind", ["naive", "sdpa"])
@pytest.mark.parametrize("way", [PerceiverResampler, SelfAttention])
def test_attention_equals_pytorchs_layer(way, kind):
    """`nn.MultiheadAttention` with the same weights, in two heads; cross-attention reads tokens, self-attention queries too."""
    torch.manual_seed(0)
    tokens, queries = (x.double() for x in drawn(2, 3, 2, 2, 3, 1, 256))
    layer = way(256, kind).double()
    other = torch.nn.MultiheadAttention(256, 2, bias=False, batch_first=True).double()
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat((layer.q.weight, layer.k.weight, layer.v.weight)))
        other.out_proj.weight.copy_(layer.out.weight)
        flat = queries.flatten(1, 2)
        normed, read = (F.layer_norm(x, (256,)) for x in (flat, tokens.flatten(1, 3)))
        read = read if way is PerceiverResampler else torch.cat((read, normed), dim=1)
        due = (flat + other(normed, read, read)[0]).view(queries.shape)
        torch.testing.assert_close(layer(tokens, queries), due)


def test_the_race_has_the_sizes_of_the_paper_the_released_model_and_a_larger_one():
    race = bimba.races()[0]
    points = race.points("full")
    counted = {(p["F"] * p["H"] * p["W"], p["G"] * p["Q"], p["D"]) for p in points}
    assert {(36864, 2304, 1024), (36864, 2304, 3584), (46656, 12544, 3584), (102400, 6400, 4096)} <= counted
    assert all(p["L"] == p["F"] * p["H"] * p["W"] + p["G"] * p["Q"] for p in points)
    assert {p.mode for p in points} == {"infer", "train"}


def test_the_race_times_every_rival_on_the_cpu_grid():
    entries = [e for e in grids.entries("bimba", "cpu", "sdpa") if e.subject == "resamplers"]
    assert {e.implementation for e in entries} == RIVALS and {e.role for e in entries} == {"rival"}
    for point in bimba.races()[0].points("cpu"):
        for entry in entries:
            assert grids.runs(entry, point, "cpu")
            result = workloads.make(point, entry, "cpu").run()
            if point.mode == "infer":
                assert result["out"].shape == (point["B"], point["G"], point["Q"], point["D"])
            else:
                assert result[0].any()  # the gradient of the tokens


def test_every_rival_is_asked_about_its_own_cases_and_licensed():
    module = subjects()["resamplers"]
    for dtype in ("float32", "bfloat16"):
        licensed = [c for c in module.cases("full") if c.matches(module.licence(dtype))]
        for rival in module.implementations()[1:]:
            assert [c for c in licensed if rival.missing(c) is None], rival.name
    [case] = [c for c in module.cases("smoke") if c.fits(F=3) and c.has("attention") and c.dtype == "float32"]
    assert [i.name for i in module.implementations()[1:] if i.missing(case) is None] == ["attention-sdpa", "attention-naive"]
