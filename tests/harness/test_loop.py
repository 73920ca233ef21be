"""Race `loop`: its points and contenders, the timed steps on a CPU, and what the page says of them."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import sweeps
import torch
from torch import nn

from harness.bench import grids, loop
from harness.bench.clock import Call, Clock
from harness.bench.run import points_here
from harness.records.speed import GPU_WAYS, Entry, Point, Speed
from harness.report import accepted, bench
from harness.report import loop as page
from harness.subjects.videomamba import loop as race

OURS = Entry("videomamba", "fused:native", "ours", variant="middle")
THEIRS = Entry("videomamba", "fused:mamba_ssm", "rival", variant="middle")
INNER = Entry("videomamba", "fused:mamba_ssm_inner", "rival", variant="middle")
VIT = Entry("vit", "cudnn", "rival", variant="base")


def point(way: str, mode: str = "train", **dims: int) -> Point:
    sizes = {"D": 576, "B": 8, "T": 8, "S": 224, "L": 1569} | dims
    return Point("loop", tuple(sizes.items()), mode, way)


class Small(nn.Module):
    """A model of two layers that counts its calls."""

    config = SimpleNamespace(depth=2)

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)
        self.clips: list[torch.Tensor] = []
        self.autocast: list[bool] = []
        self.grad: list[bool] = []

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        self.clips.append(clip)
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        self.grad.append(torch.is_grad_enabled())
        return self.head(clip.mean((2, 3, 4)).to(self.head.weight.dtype))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Small:
    model = Small()
    monkeypatch.setattr(loop, "network", lambda point, entry, device: model.to(getattr(torch, point.dtype)))
    return model


def test_a_step_of_training_is_a_users(small: Small) -> None:
    """A new batch in every step, autocast around parameters in float32, gradients clipped, all parameters moved."""
    with torch.no_grad():
        small.head.bias[9] += 50  # no label: the gradient of the bias has norm 1.06
    call = loop.make(point("eager", S=16), OURS, "cpu")
    before, first = [p.detach().clone() for p in small.parameters()], len(small.clips)
    call.run()
    call.run()
    one, two = small.clips[first:]
    assert one.shape == (8, 3, 8, 16, 16) and not torch.equal(one, two)
    assert small.training and all(small.autocast) and all(small.grad)
    assert all(p.dtype == torch.float32 for p in small.parameters())
    assert all(not torch.equal(p, was) for p, was in zip(small.parameters(), before, strict=True))
    assert sum(p.grad.square().sum() for p in small.parameters()) ** 0.5 <= 1.0 + 1e-6


def test_a_call_of_inference_has_the_points_dtype_and_no_gradients(small: Small) -> None:
    call = loop.make(point("eager", "infer", S=16, B=1), OURS, "cpu")
    out = call.run()
    assert out.dtype == torch.bfloat16 and out.is_inference() and out.shape == (1, 10)
    assert not small.training and not any(small.autocast) and not any(small.grad)


def test_the_hosts_time_is_that_of_a_layer_on_an_idle_device(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(loop, "_synchronize", lambda device: events.append(f"{device} is idle"))
    measured = loop.Loop(lambda: None, lambda: events.append("asked") or (0.5, 2.0))
    assert loop.host_seconds(measured, 4, "cuda") == (0.125, 0.5) and events == ["cuda is idle", "asked"]


def test_a_graphed_model_is_captured_without_autocasts_cache(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training in place, on a copy of a clip, within autocast; there is no GPU here, so that nothing is captured."""
    seen = []

    def capture(module: nn.Module, sample: tuple[torch.Tensor, ...], allow_unused_input: bool) -> nn.Module:
        seen.append((module, sample[0], torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    call = loop.make(point("graphed", S=16), OURS, "cpu")
    [(module, sample, autocast, cached)] = seen
    assert module is small and autocast and not cached and torch.is_autocast_cache_enabled()
    assert not any(sample.data_ptr() == clip.data_ptr() for clip in small.clips)
    call.run()


@pytest.mark.parametrize(("entry", "by"), [(OURS, "by_product"), (THEIRS, "for_inference")])
def test_ours_is_graphed_by_the_product(entry: Entry, by: str, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("by_product", "for_inference"):
        monkeypatch.setattr(loop.cuda_graphs, name, lambda *given, name=name: lambda clip: name)
    assert loop.make(point("graphed", "infer", S=16), entry, "cpu").run() == by


def test_a_window_is_synchronised_at_its_ends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample is the wall-clock time of a window, divided by its calls."""
    events: list[str] = []
    clock = Clock("cpu")
    monkeypatch.setattr(clock, "_synchronize", lambda: events.append("end"))
    now = iter([1.0, 3.0])
    monkeypatch.setattr("harness.bench.clock.time.perf_counter", lambda: next(now))
    taken = clock.time(Call(lambda: events.append("call"), window=4))
    assert taken == 0.5 and events == ["end", *["call"] * 4, "end"]


@pytest.mark.parametrize(("seconds", "calls"), [(10.0, 2), (0.025, 4), (1e-4, 32)])
def test_a_window_is_a_tenth_of_a_second_of_a_few_calls(
    seconds: float, calls: int, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.bench.loop.time.perf_counter", itertools.count(0.0, seconds).__next__)
    assert loop.make(point("eager", S=16), OURS, "cpu").window == calls


def test_the_hosts_time_is_of_the_forward_and_of_both(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    host = loop.train(small, point("eager", S=16), "cpu").host
    monkeypatch.setattr("harness.bench.loop.time.perf_counter", itertools.count(0.0, 10.0).__next__)
    assert host() == (10.0, 20.0)


def test_points_and_contenders() -> None:
    """Every model meets those of its size only, in all forms; without a GPU there is the eager one."""
    found = race.points("full")
    assert len({p.name for p in found}) == len(found)
    assert {(p["D"], p.mode, p["B"], p["T"], p.way) for p in found} == {
        (D, mode, B, T, way) for D in (192, 576) for mode, clips in race.CLIPS.items() for B, T in clips for way in race.WAYS
    }
    entries = [OURS, THEIRS, INNER, VIT, replace(OURS, variant="tiny"), replace(VIT, variant="tiny")]
    entries += [replace(OURS, implementation=name) for name in ("fused:native_kept", "fused:torch")]
    entries += [replace(VIT, implementation="reference")]
    assert [e for e in entries if race.runs(e, point("eager"), "full")] == [OURS, THEIRS, INNER, VIT]
    assert [p.way for p in points_here("cpu", "cpu", ("loop",))] == ["eager", "eager"]
    assert {p.way for p in points_here("cpu", "cuda", ("loop",))} == {"eager", *GPU_WAYS}
    assert "loop" not in grids.chosen_races(())


def made_up() -> list[Speed]:
    """Ours: kernels 50 ms, best form 60; upstream's: kernels 200, best form 210; the ViT: 25 and 30, eager."""
    times = {
        OURS: {"eager": 80, "graphed": 60, "graph": 50}, THEIRS: {"eager": 220, "graphed": 215, "graph": 200},
        INNER: {"eager": 210, "graph": 205}, VIT: {"eager": 30, "graph": 25},
    }  # fmt: skip
    found = [sweeps.speed(e, point(way), ms, host=(1e-4, 3e-4)) for e, ways in times.items() for way, ms in ways.items()]
    return [*found, Speed(THEIRS, point("compiled"), "error", reason="Unsupported: a graph break")]


def test_the_ratio_is_of_best_forms_and_its_share_of_graph_times() -> None:
    [mine] = page.grouped(made_up()).values()
    assert page.best(mine, "ours").point.way == "graphed" and page.best(mine, "upstream").entry == INNER
    assert page.advantage(mine, "upstream") == pytest.approx(210 / 60)
    assert page.advantage(mine, "upstream", whole=True) == pytest.approx(200 / 50)
    assert page.share(mine, "upstream") == pytest.approx((210 / 60) / 4)
    assert page.share([s for s in mine if s.point.way != "graph"], "upstream") is None


def test_the_page_shows_every_form_and_what_failed(tmp_path: Path) -> None:
    run = sweeps.made(tmp_path / "run", made_up())
    text = bench.write(run).read_text()
    where = "VideoMamba-M, training, 8 clips of 8 frames, bfloat16"
    row = f"| {where} | 60 (graphed) | 50 | 210 (eager) | 200 | 30 (eager) | 25 | 3.5 | 4 | 0.875 |"
    assert row in text
    assert f"{where}: 3.5 times as fast as upstream and 0.50 times as fast as a ViT in a user's loop" in text.splitlines()[2]
    assert f"| {where} | VideoMamba-M, ours | eager | 80 [" in text and "| 1.6 | 100 | 0.100 / 0.300 | 1 |" in text
    assert "**failed**: Unsupported: a graph break" in text
    assert "Not timed in this run: reduce-overhead." in text
    svg = (run.folder / "loop-D576B8T8S224-train-bfloat16.svg").read_text()
    assert all(word in svg for word in ("kernels alone", ">graphed<", ">ours<", "ms a step"))
    assert "VideoMamba-M" not in svg and "60 (graphed)" in text and "of the host's time a layer" in text
    assert Speed.parse(run.speeds[0].to_line()).host == (1e-4, 3e-4)


def test_a_gated_entry_has_no_ratio() -> None:
    mine = [s if s.entry != OURS else Speed(OURS, s.point, "gated", reason="parity forward failed") for s in made_up()]
    assert page.advantage(mine, "upstream") is None and "**not timed**: parity forward failed" in page.section(mine)


def test_forms_that_need_a_gpu_are_named_where_there_is_none() -> None:
    text = page.section([sweeps.speed(OURS, point("eager"), 80)])
    assert "Not timed in this run: graphed, compiled, reduce-overhead, graph (they need a GPU)." in text


def test_the_page_of_accepted_numbers_has_the_race(tmp_path: Path) -> None:
    readme, folder = tmp_path / "README.md", Path("accepted/h200/loop")
    readme.write_text("\n".join(accepted.MARKERS))
    accepted.write(readme, {folder: sweeps.made(tmp_path / "run", made_up())})
    text = readme.read_text()
    assert "### Loops, the host's time included\n\nFrom [loop](accepted/h200/loop/report.md):" in text and "| 0.875 |" in text
