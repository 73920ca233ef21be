"""The clock by made-up times: what is timed, when sampling ends, who is licensed, what a frontier implies."""

import math
import mmap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import test_bench_run as bench

from harness.bench import ceilings, clock, grids, interleave
from harness.bench.clock import Call, Clock
from harness.bench.run import fits_together, points_here, refusal, time_points
from harness.bench.worker import Batch, EntryFailed, LoadedCall, Worker
from harness.records import interval
from harness.records.ceilings import element_bytes
from harness.records.finding import Finding
from harness.records.interval import Interval
from harness.records.record import Record
from harness.records.speed import GPU_WAYS, Entry, Point, Speed, is_failure, last_line

OURS, THEIRS = Entry("norm", "fused:torch", "ours"), Entry("norm", "theirs", "rival")
POINT = Point("norm", (("B", 2), ("L", 10)), "infer", dtype="float32")


class Hands:
    """A clock that advances by what calls say that they take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.cpu = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(time, "process_time", lambda: self.cpu)

    def pass_by(self, wall: float, cpu: float = 0.0) -> None:
        self.wall, self.cpu = self.wall + wall, self.cpu + cpu


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    return Hands(monkeypatch)


def test_what_comes_before_a_call_is_not_timed(hands: Hands) -> None:
    call = Call(lambda: hands.pass_by(2.0, 0.5), before=lambda: hands.pass_by(7.0, 7.0))
    assert Clock("cpu").time(call) == 2.0 and Clock("cpu").time(replace(call, cpu_time=True)) == 0.5
    assert Clock("cpu").warm(call, 3) == [2.0] * 3
    assert hands.wall == 100.0 + 5 * 9.0, "it has come before each of the five"


def test_a_loops_time_is_that_of_one_call(hands: Hands) -> None:
    calls: list[int] = []
    call = Call(lambda: hands.pass_by(3.0) or calls.append(1), window=4)
    assert Clock("cpu").time(call) == 3.0 and len(calls) == 4


def touch(size: int) -> None:
    """Hold memory for a moment that goes back to the system, whatever the allocator of this process keeps."""
    with mmap.mmap(-1, size) as memory:
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1


def test_the_peak_is_in_bytes() -> None:
    assert Clock("cpu").peak(Call(lambda: None, peak=(7, 9))) == (7, 9)
    held = Clock("cpu").peak(Call(lambda: touch(200 * 2**20)))
    assert held[0] == held[1] > 200 * 2**20 and clock._status("VmHWM") < 2**40
    assert Clock("cpu").peak(Call(lambda: None))[0] < held[0], "an earlier peak is forgotten"


def loaded(hands: Hands, seconds: list[float], slowest: float = 10.0, **more: object) -> LoadedCall:
    """A worker's call that takes these seconds, one after another."""
    taken = iter(seconds)
    found = LoadedCall(OURS, "cpu", slowest)
    found._call = Call(lambda: hands.pass_by(next(taken)), **more)
    return found


def test_every_sample_is_kept_the_slow_ones_too(hands: Hands) -> None:
    batch = loaded(hands, [1.0, 9.0, 1.0, 1.0, 1.0]).time(100.0, 4)
    assert batch.seconds == [1.0, 9.0, 1.0, 1.0] and batch.spent == 12.0 and batch.joules is None
    assert loaded(hands, [1.0] * 9).time(2.5, 40).seconds == [1.0] * 3, "until the seconds are spent"
    assert loaded(hands, [1.0] * 9).time(0.0, 40).seconds == [1.0], "one at least"
    assert loaded(hands, [1.0] * 40, window=4).time(7.0, 40) == Batch([1.0, 1.0], None, None, 4)


def test_a_call_that_is_too_slow_is_out_of_time(hands: Hands) -> None:
    with pytest.raises(TimeoutError, match="a call takes 11.0 s, and 10 s are allowed"):
        loaded(hands, [1.0, 11.0]).time(100.0, 40)
    assert loaded(hands, [10.0]).time(1.0, 40).seconds == [10.0]


class Scripted:
    """A worker whose batches are written down; a word in place of one is how it fails."""

    def __init__(self, *batches: list[float] | str, entry: Entry = OURS) -> None:
        self.entry, self._batches, self.asked = entry, list(batches), []

    def start(self) -> None:
        self.asked.append("start")

    def ask(self, request: str, *arguments: object, timeout: float) -> object:
        self.asked.append(request)
        if request != "time":
            return {"warm": [5.0], "allocated": 3, "reserved": 4}
        batch = self._batches.pop(0) if len(self._batches) > 1 else self._batches[0]
        if isinstance(batch, str):
            raise EntryFailed(batch, "planted")
        return Batch(batch, None, None)


def timed(*workers: Scripted, budget: float = 1.0, fewest: int = 3) -> list[Speed]:
    return list(interleave.interleave(list(workers), POINT, budget, together=False, fewest=fewest))


def test_sampling_ends_when_the_interval_is_narrow_and_not_before() -> None:
    [steady] = timed(Scripted([1e-6] * 3))
    assert steady.stopped == "interval" and len(steady.seconds) == 9, "seven samples at least"
    [noisy] = timed(Scripted([1e-3, 2e-3, 3e-3]), budget=0.05)
    assert noisy.stopped == "budget" and sum(noisy.seconds) >= 0.05 and len(noisy.seconds) == 27
    [slow] = timed(Scripted([7.0], [8.0], [9.0]), budget=1.0)
    assert slow.seconds == (7.0, 8.0, 9.0) and slow.stopped == "budget", "three of slow ones"
    [long] = timed(Scripted([1e-9, 2e-9] * 12), budget=100.0)
    assert len(long.seconds) == 408, "400 are enough"
    assert (steady.warm, steady.allocated, steady.reserved, steady.alone) == ((5.0,), 3, 4, False)


def test_the_energy_and_the_budget_are_those_of_all_calls_of_a_window() -> None:
    class Metered(Scripted):
        """Uses 6 joules in every batch, for each of whose times four calls are made."""

        def ask(self, request: str, *arguments: object, timeout: float) -> object:
            answer = super().ask(request, *arguments, timeout=timeout)
            return answer._replace(joules=6.0, calls=4) if isinstance(answer, Batch) else answer

    [speed] = timed(Metered([0.1, 0.2, 0.3]), budget=2.0)
    assert speed.joules == 0.5 and speed.seconds == (0.1, 0.2, 0.3), "2.4 s are more than its budget"
    [short] = timed(Metered([1e-6] * 3))
    assert short.joules is None, "the counter is too slow for it"


def test_an_outlier_is_kept_and_asks_for_more() -> None:
    [speed] = timed(Scripted([1e-3] * 6 + [1.0], [1e-3] * 7), budget=10.0)
    assert 1.0 in speed.seconds and speed.median.middle == 1e-3


def test_who_fails_ends_alone_and_takes_turns_before() -> None:
    order: list[str] = []

    class Noted(Scripted):
        def ask(self, request: str, *arguments: object, timeout: float) -> object:
            order.extend([self.entry.implementation] * (request == "time"))
            return super().ask(request, *arguments, timeout=timeout)

    good, bad = Noted([1e-3, 2e-3, 4e-3]), Noted([1e-3, 2e-3, 4e-3], "timeout", entry=THEIRS)
    one, other = timed(good, bad, budget=0.03)
    assert (one.status, other.status, other.reason) == ("ok", "timeout", "planted")
    assert order[:5] == ["fused:torch", "theirs", "fused:torch", "theirs", "fused:torch"]


def test_what_does_not_fit_with_the_others_is_tried_alone() -> None:
    class Crowded(Scripted):
        """Has no room when it is loaded first."""

        def ask(self, request: str, *arguments: object, timeout: float) -> object:
            answer = super().ask(request, *arguments, timeout=timeout)
            if request == "load" and self.asked.count("load") == 1:
                raise EntryFailed("oom", "no room")
            return answer

    speeds = timed(Scripted([1e-6] * 9), Crowded([1e-6] * 9, entry=THEIRS))
    assert [(s.status, s.alone) for s in speeds] == [("ok", False), ("ok", True)]
    assert timed(Crowded([1e-6] * 9))[0].status == "oom", "by itself it has no second try"


def test_medians_and_ratios_by_numbers() -> None:
    assert interval.median([1.0, 9.0, 2.0, 8.0]).middle == 5.0 and interval.median([3.0, 1.0, 2.0]).middle == 2.0
    assert interval.median([1.0, 3.0]) == Interval(2.0, 1.0, 3.0) and interval.median([4.0]) == Interval(4.0, 4.0, 4.0)
    assert interval.ratio([2.0] * 9, [3.0] * 9) == Interval(1.5, 1.5, 1.5), "new over old"
    assert Interval(10.0, 9.0, 12.0).spread == pytest.approx(0.15) and Interval(0.0, 0.0, 0.0).spread == math.inf
    many = [float(i) for i in range(1, 102)]
    found = interval.median(many)
    assert 35 < found.low < 45 and 57 < found.high < 67, "95 % of an interval of about 20 to either side"


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.9, 0.9799, "FASTER"), (0.9, 0.9801, "UNSURE"), (0.98, 1.02, "SAME"), (0.9799, 1.0, "UNSURE"),
        (1.0, 1.0201, "UNSURE"), (1.0201, 1.1, "SLOWER"), (1.0199, 1.1, "UNSURE"), (0.5, 2.0, "UNSURE"),
    ],
)  # fmt: skip
def test_verdicts_need_the_whole_interval(low: float, high: float, word: str) -> None:
    assert interval.verdict(Interval((low + high) / 2, low, high)) == word


def licence(check: str, entry: Entry = OURS, dtype: str = "float32", error: float = 0.5, status: str = "") -> Record:
    found = Finding("y", "l2", error, 1.0)
    status = status or ("pass" if error <= 1 else "fail")
    reason = "" if status in ("pass", "fail") else "raised"
    who = (entry.subject, entry.implementation, entry.role)
    return Record(*who, check, "case", dtype, status, findings=(found,), reason=reason)


def test_a_licence_is_of_the_same_dtype_mode_subject_and_name() -> None:
    train = replace(POINT, mode="train")
    both = [licence("forward"), licence("backward")]
    assert refusal(OURS, POINT, both) == refusal(OURS, train, both) == ("", 0.0)
    none = ("parity asked it nothing in this precision", 0.0)
    others = [licence("forward", dtype="bfloat16"), licence("forward", THEIRS)]
    others.append(licence("forward", replace(OURS, subject="conv")))
    assert refusal(OURS, POINT, []) == refusal(OURS, POINT, others) == none
    assert refusal(OURS, POINT, [licence("backward")]) == none, "of training only"
    assert refusal(OURS, POINT, [licence("forward", status="skip")]) == none
    assert refusal(OURS, POINT, [licence("forward"), licence("backward", error=3.0)]) == ("", 0.0)
    said, worst = refusal(OURS, train, [licence("forward"), licence("backward", error=3.0)])
    assert said == "parity backward failed in case: y is wrong by 3 budgets" and worst == 3.0
    assert refusal(OURS, POINT, [*both, licence("forward", error=2.0), licence("forward", error=5.0)])[1] == 5.0
    for status in ("error", "oom", "timeout"):
        found = [licence("forward"), licence("forward", status=status)]
        assert "parity forward failed in case" in refusal(OURS, POINT, found)[0]
    assert refusal(Entry("norm", "reference", "rival"), POINT, []) == ("", 0.0)


@pytest.mark.usefixtures("forked_workers")
def test_memory_that_ran_out_implies_longer_points_of_the_same_curve_only(tmp_path: Path) -> None:
    greedy = bench.entry("greedy")
    passed = [bench.passed(greedy), bench.passed(greedy, "backward")]
    run = bench.new_run(tmp_path, *passed)
    for mode, length, status in (("infer", 2000, "oom"), ("train", 900, "timeout")):
        run.add_speed(Speed(greedy, bench.point(length, mode), status, reason="planted"))
    wanted = [bench.point(*p) for p in ((100, "infer"), (2000, "train"), (3000, "infer"), (800, "train"))]
    wanted.append(replace(wanted[2], dtype="bfloat16"))
    run.add(replace(passed[0], dtype="bfloat16"))
    time_points(run, wanted, lambda p: [greedy], None, 0.001, 10.0, "cpu", 1, lambda speed: None)
    assert [s.status for s in run.speeds[2:]] == ["ok", "implied", "implied", "ok", "oom"], "another mode or dtype is tried"
    assert run.speeds[3].reason == "timeout at fake-B1-L900-train-eager-float32 already"
    other = replace(greedy, implementation="other")
    run.add(replace(passed[0], implementation="other"))
    time_points(run, [bench.point(2500)], lambda p: [other], None, 0.001, 10.0, "cpu", 1, lambda speed: None)
    assert run.speeds[-1].status == "oom", "another implementation is tried"


def test_room_for_all_is_of_tokens_and_of_memory(tmp_path: Path) -> None:
    run = bench.new_run(tmp_path)
    few, many = (Point("fake", (("B", 10), ("L", length)), "infer", dtype="float32") for length in (30_000, 30_001))
    assert fits_together(run, [OURS], few) and not fits_together(run, [OURS], many)
    assert not fits_together(run, [OURS], replace(few, mode="train"))


FAILURES = [("gated", True), ("error", True), ("timeout", True), ("oom", False), ("implied", False)]


@pytest.mark.parametrize(("status", "ours"), FAILURES)
def test_which_speeds_fail_a_run(status: str, ours: bool) -> None:
    assert is_failure(Speed(OURS, POINT, status, reason="why")) is ours
    assert not is_failure(Speed(THEIRS, POINT, status, reason="why")) and not is_failure(Speed(OURS, POINT, "ok", (1.0,)))


def test_the_words_of_points_and_speeds() -> None:
    assert POINT.name == "norm-B2-L10-infer-eager-float32" and POINT.tokens == 20 and not POINT.clips
    clip = Point("tiny", (("B", 3), ("T", 4), ("S", 32), ("L", 17)), "train", "graph")
    assert clip.curve == ("tiny", ("B", 3), ("S", 32), "train", "graph", "bfloat16") and clip.clips and clip.tokens == 51
    assert Entry("vit", "reference", "rival", variant="tiny").name == "vit tiny naive"
    speeds = [Speed(OURS, POINT, "ok", (1.0,)), Speed(OURS, POINT, "oom", reason="x")]
    speeds.append(Speed(THEIRS, POINT, "gated", reason="x"))
    assert last_line(speeds) == "1 timed, 1 oom (rivals: 0 timed, 1 gated)"
    assert [element_bytes(d) for d in ("float32", "float64", "bfloat16", "float16")] == [4, 8, 2, 2]
    half = Speed(OURS, POINT, "ok", (1.0, 2.0, 90.0), bound=1.0)
    assert half.share == 0.5 and replace(half, bound=2.1).no_bound and not replace(half, bound=2.1, bound_error=0.06).no_bound


def test_a_ceiling_is_the_best_of_its_samples(hands: Hands) -> None:
    rates = ceilings._Rates("cpu", 0.0)
    taken = iter([1.0] * 3 + [3.0, 2.0, 2.02, *[4.0] * 8])
    assert rates.best(100.0, lambda: hands.pass_by(next(taken))) == 50.0
    assert rates.uncertainty == 0.05, "the third best takes half as long again, and no more is doubted"
    taken = iter([9.0] * 3 + [2.0, 2.01, 2.02, *[3.0] * 8])
    again = ceilings._Rates("cpu", 0.0)
    again.best(100.0, lambda: hands.pass_by(next(taken)))
    assert again.uncertainty == pytest.approx(0.01)
    assert ceilings._passes(2**20)[0][0] == ceilings._passes(2**22)[0][0] == 2**24 and ceilings._passes(2**28)[1][0] == 2**28


@pytest.mark.usefixtures("forked_workers")
def test_an_error_of_an_entry_is_no_lack_of_memory() -> None:
    worker = Worker(Entry("raiser", "fake", "ours", "fakes:raiser"), "cpu", 1)
    try:
        for words, status in (("shapes do not fit", "error"), ("CUDA error: out of memory", "oom")):
            with pytest.raises(EntryFailed) as failure:
                worker.ask("load", Point("fake", (("B", 1), ("L", len(words))), "infer", dtype="float32"), timeout=60.0)
            assert failure.value.status == status and words in failure.value.reason
    finally:
        worker.end()


def test_who_is_timed() -> None:
    races = grids.races()
    kept = Entry("mixer", "fused:native_kept", "ours")
    points = [Point("mixer", (("B", 1), ("L", 9), ("D", 32)), mode) for mode in ("infer", "train")]
    assert [grids.runs(kept, p, "full") for p in points] == [False, True]
    timed = {e.implementation for name in ("scan", "norm") for e in grids.entries(name, "cpu", "sdpa")}
    assert timed == {"fused:cpu", "fused:torch"}, "the reference is not, nor what is absent"
    assert grids.entries("norm", "cpu", "sdpa", ("fused:native",)) == []
    assert not {p.way for p in points_here("full", "cpu", ("tiny", "loop"))} & set(GPU_WAYS)
    assert {p.way for p in points_here("full", "cuda", ("tiny",))} >= {"eager", "graph"}
    for name, race in races.items():
        points = [p for grid in grids.GRIDS for p in race.points(grid)]
        assert all(p.race == name for p in points)
        lengths = [p["L"] for p in race.points("full") if p.clips and p["B"] == 1 and p.way == "eager" and p.mode == "infer"]
        assert name in ("data", "loop", "chunks") or lengths == sorted(lengths), "short ones first, for frontiers"
