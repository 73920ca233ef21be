"""Inputs that forget fast and inputs that remember: what is drawn, and the races that are timed with them."""

import pytest
import torch
from torch.nn.functional import softplus

from fused.ops.selective_scan import schedule
from fused.ops.selective_scan.path import path_of
from harness.bench import grids, run, workloads
from harness.fixtures.functional_modules import delta_bias
from harness.judge.case import Case
from harness.judge.registry import subjects
from harness.records.speed import Entry, Point


def steps(*options):
    return softplus(delta_bias(Case("scan", (("B", 1), ("L", 4), ("E", 400), ("N", 4)), options), 0, "delta_bias", 400))


def test_steps_are_near_where_a_fresh_model_has_them_or_in_mambas_own_range():
    fresh, long, mixed = steps("fresh"), steps("long-memory"), steps()
    assert fresh.min() > 0.5 and fresh.max() < 0.95
    assert long.min() >= 0.99e-3 and long.max() <= 0.101 and long.log10().std() > 0.4
    assert mixed[::2].max() <= 0.101 and mixed[1::2].min() > 0.5


@pytest.mark.parametrize("name", ["scan-both", "middle"])
def test_a_race_has_two_more_that_differ_by_their_inputs_alone(name):
    """They are timed by default where their time differs: the operator's does not."""
    races, whole = grids.races(), grids.races()[name]
    for option in ("fresh", "long-memory"):
        race = races[f"{name}-{option}"]
        assert race.options == (option,) and race.contenders == whole.contenders
        own, points = ({(p.dims, p.mode, p.way) for p in r.points("full")} for r in (race, whole))
        assert own <= points and {way for *_, way in own} >= {"graph"}
        assert {p.race for p in race.points("full")} == {race.name} and not race.points("long")
        assert (race.name in grids.chosen_races(())) is (name == "middle")
    assert name in grids.chosen_races(())


@pytest.mark.parametrize("option", ["fresh", "long-memory", "worst-case", "rescan"])
def test_a_mixer_that_is_split_is_timed_with_every_kind_of_inputs(option):
    race = grids.races()[f"mixer-{option}"]
    assert race.options == (option, "cast") and race.name in grids.chosen_races(()) and not race.points("cpu")
    assert {(p.race, p["L"], p.mode, p.way) for p in race.points("full")} == {
        (race.name, 9409, "infer", way) for way in ("eager", "graph")
    }
    assert race.licence is not None
    [named] = race.licence("bfloat16")
    [case] = [c for c in subjects()["mixer"].cases("full") if c.name == named]
    assert case.has(option) and case["L"] >= schedule.MOMENTS_FROM > case["L"] - 32 and case["L"] % schedule.TILE


def test_models_are_met_with_and_without_a_class_token_with_either_kind_of_inputs():
    for name in ("middle", "middle-fresh", "middle-long-memory"):
        lengths = {p["L"]: p.clips for p in grids.races()[name].points("full") if (p.mode, p.way) == ("infer", "graph")}
        assert all(lengths[196 * T + 1] and lengths[196 * T] is False for T in (32, 40, 48, 64)), name


def test_graphs_and_lengths_near_where_the_curves_cross_are_timed():
    lengths = {p["L"] for p in grids.races()["middle"].points("full") if p.way == "graph" and p.mode == "infer"}
    assert {196 * T + 1 for T in (32, 40, 48, 64)} <= lengths and {196 * T for T in (32, 40, 48, 64)} <= lengths
    graphs = {(p["B"], p["L"]) for p in grids.races()["scan-both"].points("full") if p.way == "graph"}
    assert graphs == {(1, 9409), (8, 1569), (64, 197), (1, 12545)}


@pytest.mark.parametrize("option", ["fresh", "long-memory"])
def test_a_licence_is_of_the_inputs_that_are_timed(option):
    race = grids.races()[f"scan-both-{option}"]
    assert race.licence is not None
    named = race.licence("bfloat16")
    assert named == tuple(c.name for c in subjects()["scan_both"].cases("full") if c.has(option) and c.dtype == "bfloat16")


@pytest.mark.parametrize("name", ["middle", "middle-fresh", "middle-long-memory"])
def test_a_models_licence_has_as_many_tokens_as_its_longer_points_take_the_other_path_with(name):
    """Every token has logits: those of CLS would hardly show the states of a split far away."""
    race, option = grids.races()[name], name.removeprefix("middle").removeprefix("-")
    [request] = run.licence_requests([(name, Entry("videomamba", "fused:torch", "ours"))], "cpu", "bfloat16", 1)
    [long] = [c for c in request.selected_cases() if c["L"] >= schedule.MOMENTS_FROM]
    assert long.has("readout=tokens") and long.has("cast") and [o for o in long.options if o in ("fresh", "long-memory")] == (
        [option] if option else []
    )
    E = 2 * long["D"]
    assert "by moments" in path_of(long["B"], long["L"], E, torch.bfloat16, 132) and race.checks == ()
    [vit] = run.licence_requests([(name, Entry("vit", "sdpa", "rival"))], "cpu", "bfloat16", 1)
    assert vit.selected_cases() and all(c.subject == "vit" for c in vit.selected_cases())


def test_a_timed_model_has_the_steps_of_its_race():
    entry, dims = Entry("videomamba", "fused:torch", "ours", variant="tiny"), (("B", 1), ("T", 1), ("S", 32), ("L", 5))
    for option, low, high in (("fresh", 0.5, 0.95), ("long-memory", 0.9e-3, 0.11)):
        model = workloads.network(Point(f"middle-{option}", dims, "infer", dtype="float32"), entry, "cpu")
        biases = [p for name, p in model.named_parameters() if name.endswith(("dt_proj.bias", "dt_proj_b.bias"))]
        assert len(biases) == 48 and softplus(torch.cat(biases)).min() > low and softplus(torch.cat(biases)).max() < high
