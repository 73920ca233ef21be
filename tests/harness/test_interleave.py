"""Timing against entries whose answers are known."""

import pytest

from harness.bench.interleave import interleave
from harness.bench.worker import EntryFailed, Worker
from harness.records.speed import Entry, Point, Speed


def point(length: int) -> Point:
    return Point("fake", (("B", 1), ("L", length)), "infer", dtype="float32")


@pytest.fixture
def worker(forked_workers):
    made = []

    def make(kind: str, variant: str = "") -> Worker:
        made.append(Worker(Entry(kind, "fake", "ours", f"fakes:{kind}", variant), "cpu", 1))
        return made[-1]

    yield make
    for one in made:
        one.end()


def test_a_known_time_is_found_and_rivals_are_interleaved(worker) -> None:
    fast, slow = interleave([worker("sleeper"), worker("sleeper")], point(20), budget=0.5)
    for speed in (fast, slow):
        assert speed.status == "ok" and not speed.alone
        assert 0.020 <= speed.median.middle < 0.023
        assert len(speed.seconds) >= 7 and len(speed.warm) == 3
        assert speed.stopped in ("interval", "budget")
    assert Speed.parse(fast.to_line()) == fast


def test_twice_the_work_takes_twice_the_time(worker) -> None:
    one = worker("sleeper")
    times = [next(interleave([one], point(length), budget=0.3)).median.middle for length in (20, 40)]
    assert 1.8 < times[1] / times[0] < 2.1


def test_out_of_memory_is_a_result_and_the_worker_lives(worker, tmp_path) -> None:
    greedy, other = worker("greedy"), worker("sharer", str(tmp_path))
    speeds = {s.entry.subject: s for s in interleave([greedy, other], point(1001), budget=0.01)}
    assert speeds["greedy"].status == "oom" and "1001" in speeds["greedy"].reason
    assert speeds["sharer"].status == "ok" and not speeds["sharer"].alone
    assert next(interleave([greedy], point(1000), budget=0.01)).status == "ok"


def test_what_does_not_fit_beside_its_rivals_is_timed_alone(worker, tmp_path) -> None:
    first, second = interleave([worker("sharer", str(tmp_path)) for _ in range(2)], point(2), 0.05, together=False)
    assert (first.status, first.alone) == ("ok", False)
    assert (second.status, second.alone) == ("ok", True)


def test_a_crash_costs_one_worker(worker) -> None:
    crash, well = worker("mortal"), worker("sleeper")
    speeds = {s.entry.subject: s for s in interleave([crash, well], point(6), budget=0.05)}
    assert speeds["mortal"].status == "error" and "exit code 11" in speeds["mortal"].reason
    assert speeds["sleeper"].status == "ok"
    assert next(interleave([crash], point(3), budget=0.01)).status == "ok"  # it was started again


def test_a_stuck_worker_is_a_timeout(worker) -> None:
    stuck = worker("sleeper")
    stuck.ask("load", point(6), timeout=120.0)  # it has imported what it needs
    with pytest.raises(EntryFailed, match="no answer within") as failure:
        stuck.ask("load", point(9000), timeout=1.0)  # 9 s a call, and three of them
    assert failure.value.status == "timeout"


def test_a_call_that_takes_too_long_is_a_timeout(worker) -> None:
    slow = worker("dawdler")
    assert next(interleave([slow], point(2), budget=0.01)).status == "ok"
    ended = next(interleave([slow], point(3), budget=0.01))
    assert ended.status == "timeout" and "11.0 s" in ended.reason and "10 s are allowed" in ended.reason


def test_memory_of_a_call_is_seen(worker) -> None:
    eater = worker("hungry")
    small, large = (next(interleave([eater], point(n), budget=0.01)).allocated for n in (16, 216))
    assert large - small == pytest.approx(200 * 2**20, rel=0.1)


def test_a_loops_samples_are_calls_of_a_window(worker) -> None:
    """The budget is that of all calls. The host is asked in every turn, so that other work in one of them does not count."""
    [speed] = interleave([worker("looper")], point(10), budget=0.2)
    assert 0.010 <= speed.median.middle < 0.020 and speed.host == (0.25, 0.5)
    assert len(speed.seconds) <= 10
