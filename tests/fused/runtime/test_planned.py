"""Launch plans of functions of PyTorch operations: what a plan knows of its arguments, what it repeats, which plans stay."""

import threading

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fused.runtime import plans
from fused.runtime.plans import Planned
from fused.runtime.recording import NotRecordable, Recorder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_strides_alignments_and_values_make_plans_of_their_own():
    planned = Planned(lambda x, factor: (x[1:] * factor,))
    base = torch.arange(20.0, device=DEVICE)
    square = base[:16].view(4, 4)
    kinds = [(square, 2.0), (square.t(), 2.0), (base[1:17].view(4, 4), 2.0), (square, 3.0)]
    with plans.enabled(True, DEVICE):
        for _ in range(3):
            for x, factor in kinds:
                assert torch.equal(planned(x, factor)[0], x[1:] * factor)
    assert [type(x) for x in planned.plans().values()] == [plans.Plan] * len(kinds)


@pytest.mark.usefixtures("nan_filled")
def test_zeros_and_what_is_written_in_place_are_repeated():
    planned = Planned(lambda x: (torch.zeros_like(x).add_(x),))
    with plans.enabled(True, DEVICE):
        for value in range(4):
            x = torch.full((3,), float(value), device=DEVICE)
            assert torch.equal(planned(x)[0], x)
    assert [type(x) for x in planned.plans().values()] == [plans.Plan]


@pytest.mark.parametrize("sizes", [(0,), (0, 3)], ids=str)
def test_a_plan_has_tensors_without_elements(sizes):
    """They are all that there is to the workspace, or a part of it, and no kernel reads them."""

    def function(x):
        for size in sizes:
            torch.zeros(size, device=x.device)
        return x.sum(0), torch.zeros_like(x)

    planned, x = Planned(function), torch.ones(0, 2, device=DEVICE)
    with plans.enabled(True, DEVICE):
        for _ in range(4):
            assert all(map(torch.equal, planned(x), function(x)))
    assert [type(x) for x in planned.plans().values()] == [plans.Plan]


def test_operations_of_a_plan_are_repeated_without_autocast_which_stays_on():
    planned, x = Planned(lambda x: (x @ x.t(),)), torch.randn(4, 4, device=DEVICE)
    with plans.enabled(True, DEVICE):
        due = [planned(x)[0] for _ in range(2)][1]
        with torch.autocast(DEVICE, torch.bfloat16):
            got = planned(x)[0]
            assert torch.is_autocast_enabled(DEVICE)
    assert got.dtype == torch.float32 and torch.equal(got, due)


def test_threads_have_plans_of_their_own():
    """Triton's interpreter is not made for threads, so that the planned function is of PyTorch operations."""
    planned, outs = Planned(lambda x: torch.cat((x @ x.t(), torch.zeros_like(x)))), {}

    def work(number):
        for turn in range(100):
            x = torch.full((8, 8), float(1000 * number + turn), device=DEVICE)
            outs[number, turn] = planned(x), x
        kinds[number] = [type(plan) for plan in planned.plans().values()]

    kinds = {}
    with plans.enabled(True, DEVICE):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert kinds == {number: [plans.Plan] for number in range(4)} and not planned.plans()
    assert len(outs) == 400 and all(torch.equal(out, torch.cat((x @ x.t(), 0 * x))) for out, x in outs.values())


def test_plans_are_bounded_and_the_last_used_stay(monkeypatch):
    monkeypatch.setattr(plans, "LIMIT", 2)
    sizes: list[int] = []
    planned = Planned(lambda x: sizes.append(len(x)) or x * 2)
    with plans.enabled(True, DEVICE):
        for size in (1, 1, 2, 2, 1, 3):
            planned(torch.ones(size, device=DEVICE))
        assert len(planned.plans()) == 2 and [x.__class__ for x in planned.plans().values()] == [plans.Plan, type(None)]
        planned(torch.ones(1, device=DEVICE))
    assert sizes == [1, 1, 2, 2, 3], "the plan of size 1 has run twice"


def test_inputs_that_share_memory_may_move_apart():
    """A slice of one tensor is an input beside another slice: their distance is part of the plan."""
    planned = Planned(lambda x, y: (torch.cat((x, y)), y.neg()))
    base = torch.arange(64.0, device=DEVICE)
    with plans.enabled(True, DEVICE):
        for start in (16, 16, 16, 32, 48):
            x, y = base[:4], base[start : start + 4]
            joined, negated = planned(x, y)
            assert torch.equal(joined, torch.cat((x, y))) and torch.equal(negated, -y)


def test_what_cannot_be_repeated_runs_as_it_is():
    outside, calls = torch.ones(3, device=DEVICE), []

    def function(x):
        calls.append(x)
        return x + outside

    planned = Planned(function)
    with plans.enabled(True, DEVICE):
        for value in range(4):
            assert torch.equal(planned(outside * value), outside * value + 1)
    assert [type(x) for x in planned.plans().values()] == [str] and len(calls) == 5  # the record is followed by a plain call


@pytest.mark.parametrize("function", [lambda x: (x, x + 1), lambda x: (x * x.sum().item(),)], ids=["input", "number"])
def test_a_result_that_is_an_input_or_depends_on_a_number_has_no_plan(function):
    planned = Planned(function)
    with plans.enabled(True, DEVICE):
        for value in range(4):
            x = torch.full((3,), float(value), device=DEVICE)
            found, due = planned(x), function(x)
            assert all(map(torch.equal, found, due)) and [y is x for y in found] == [y is x for y in due]
    assert [type(x) for x in planned.plans().values()] == [str]


def test_memory_that_no_step_writes_is_no_result_of_a_plan():
    """As of a kernel that is launched past the recorder."""

    def function(x):
        out = torch.empty_like(x)
        with _disable_current_modes():
            out.copy_(x)
        return out

    planned, x = Planned(function), torch.ones(3, device=DEVICE)
    with plans.enabled(True, DEVICE):
        assert all(torch.equal(planned(x * value), x * value) for value in range(4))
    assert "written by nothing" in next(iter(planned.plans().values()))


def test_a_tensor_subclass_is_left_to_the_dispatcher():
    class Wrapped(Tensor):
        pass

    assert Planned(lambda x: x)(torch.ones(2, device=DEVICE).as_subclass(Wrapped)) is NotImplemented


def test_a_recorder_tells_what_it_does_not_know():
    outside = torch.ones(3)
    with Recorder([torch.ones(2)]) as recorder, pytest.raises(NotRecordable, match=r"shape \(3,\) is neither an input nor"):
        recorder.view(outside)
