"""The tolerance rule by numbers just inside and just outside of each of its terms, and what never passes."""

import math

import pytest
import torch
from torch import Tensor

from harness.judge.case import Case
from harness.judge.seeds import is_jittered, seeds
from harness.judge.trial import worst_of
from harness.records.finding import Finding, PlainNotFinite, Tally, differing, rms, unit_roundoff
from harness.records.record import Record, judged

ONES = torch.ones(64, dtype=torch.float64)


def verdict(*samples: tuple[Tensor | None, Tensor | None, Tensor | None]) -> dict[str, bool]:
    """Whether each norm passes, over samples (got, plain, truth)."""
    return {f.norm: f.passed for f in findings(*samples)}


def findings(*samples: tuple[Tensor | None, Tensor | None, Tensor | None]) -> list[Finding]:
    tally = Tally()
    for got, plain, truth in samples:
        tally.add("x", got, plain, truth)
    return tally.findings()


def off_by(error: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return (ONES + error).to(dtype)


@pytest.mark.parametrize("sign", [1, -1])
def test_twice_the_error_of_plain_is_allowed(sign: int) -> None:
    plain = off_by(0.01)
    assert verdict((off_by(sign * 0.01999), plain, ONES)) == {"l2": True, "max": True}
    assert verdict((off_by(sign * 0.02001), plain, ONES)) == {"l2": False, "max": False}


@pytest.mark.parametrize(
    ("dtype", "inside", "outside"),
    [
        (torch.float32, 8 * 2.0**-24, 10 * 2.0**-24), (torch.float32, -9 * 2.0**-24, -10 * 2.0**-24),  # 1 and 8 of an exp
        (torch.bfloat16, -(2.0**-8), 2.0**-7), (torch.float16, -(2.0**-11), 2.0**-10), (torch.float64, -(2.0**-53), 2.0**-52),
    ],
)  # fmt: skip
def test_one_rounding_of_a_right_plain_is_allowed(dtype: torch.dtype, inside: float, outside: float) -> None:
    assert verdict((off_by(inside, dtype), off_by(0, dtype), ONES)) == {"l2": True, "max": True}
    assert verdict((off_by(outside, dtype), off_by(0, dtype), ONES)) == {"l2": False, "max": False}


def test_unit_roundoffs() -> None:
    exp = 8 * 2.0**-24
    due = {torch.float32: 2.0**-24 + exp, torch.bfloat16: 2.0**-8 + exp, torch.float16: 2.0**-11 + exp, torch.float64: 2.0**-53}
    assert {dtype: unit_roundoff(dtype) for dtype in due} == due


def test_the_rounding_is_of_the_truths_size() -> None:
    """Of 1000 the unit is 1000 times that of 1."""
    assert verdict((1000 * off_by(8 * 2.0**-24), off_by(999).float(), 1000 * ONES))["max"]
    assert not verdict((off_by(20 * 2.0**-24), off_by(0), ONES))["max"]


def test_each_norm_sees_what_the_other_does_not() -> None:
    one = torch.zeros(64, dtype=torch.float64)
    one[7] = 1
    spread = (ONES + 0.001).float()
    assert verdict(((ONES + 0.005 * one).float(), spread, ONES)) == {"l2": True, "max": False}
    assert verdict(((ONES + 0.0019).float(), (ONES + 0.001 * one).float(), ONES)) == {"l2": False, "max": True}


def test_errors_of_seeds_are_pooled_by_root_mean_square() -> None:
    plain = off_by(0.01)
    for errors, allowed in (((0.0395, 0, 0, 0), True), ((0.0405, 0, 0, 0), False), ((0.0295, 0, 0.0265, 0), True)):
        for turn in range(4):
            turned = errors[turn:] + errors[:turn]
            assert verdict(*((off_by(e), plain, ONES) for e in turned)) == {"l2": allowed, "max": allowed}, (errors, turn)
    assert verdict((off_by(0.0199), off_by(0.01), ONES), (off_by(0.0), off_by(0.0), ONES))["l2"]
    assert not verdict((off_by(0.0201), off_by(0.01), ONES), (off_by(0.0), off_by(0.0), ONES))["l2"]
    assert rms([3.0, -4.0]) == pytest.approx(math.sqrt(12.5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_not_finite_never_passes(bad: float, seed: int) -> None:
    """Whatever plain's own error, in whichever seed, and where 0 is due."""
    wide = torch.full((64,), 1e30)
    got = [wide.clone() for _ in range(3)]
    got[seed][5] = bad
    assert verdict(*((g, wide, ONES) for g in got)) == {"l2": False, "max": False}
    zeros = torch.zeros(64, dtype=torch.float64)
    got = [zeros.float() for _ in range(3)]
    got[seed][5] = bad
    assert not any(verdict(*((g, zeros.float(), zeros) for g in got)).values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_plain_that_is_not_finite_is_no_measure(bad: float) -> None:
    """Not even for a got that has the same."""
    plain = off_by(0)
    plain[3] = bad
    for got in (plain, off_by(0)):
        with pytest.raises(PlainNotFinite, match="the reference's x is not finite in torch.float32"):
            verdict((got, plain, ONES))


def test_where_zero_is_due_nothing_else_is() -> None:
    truth = ONES.clone()
    truth[:2] = 0
    plain, stray = truth.float(), truth.float()
    stray[1] = 1e-45  # the smallest there is
    assert verdict((plain, plain, truth)) == {"l2": True, "max": True, "zero": True}
    assert verdict((stray, plain, truth)) == {"l2": True, "max": True, "zero": False}
    assert not verdict((stray, plain, truth), (plain, plain, truth))["zero"], "the first of two seeds"
    assert not verdict((plain, plain, truth), (-stray, plain, truth))["zero"], "the last of two seeds"
    assert verdict((stray, stray, truth))["zero"], "plain has it at one of two places"
    rounded = truth.clone()
    rounded[:2] = 1e-9
    assert "zero" not in verdict((plain, plain, rounded)), "the truth is small, not 0"


def test_a_gradient_that_does_not_exist() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert verdict((None, None, None)) == {"l2": True, "max": True, "zero": True}
    assert all(verdict((zeros, None, None)).values()), "0 is none"
    assert not all(verdict((ones, None, None)).values()), "something where there is none"
    assert not all(verdict((ones * math.nan, None, None)).values())
    assert verdict((None, zeros, zeros.double())) == {"form": False}, "none where there is one, even if it is 0"
    [found] = findings((None, ones, ones.double()))
    assert found.note == "got no gradient, due is torch.float32 (3,)" and found.error == math.inf


def test_form_is_asked_in_every_seed() -> None:
    right, plain = off_by(0), off_by(0)
    for got in (right.double(), right.bfloat16(), right[:63], right.view(8, 8)):
        assert verdict((got, plain, ONES)) == verdict((got, plain, ONES), (right, plain, ONES)) == {"form": False}
        assert verdict((right, plain, ONES), (got, plain, ONES)) == {"form": False}
    empty = torch.zeros(0, 3)
    assert verdict((empty, empty, empty.double())) == {"l2": True, "max": True}


def test_the_numbers_of_a_finding() -> None:
    truth = torch.tensor([[3.0, 0.5], [4.0, 0.25]], dtype=torch.float64)
    got, plain = truth.float(), truth.float()
    got[1, 0] -= 0.5
    plain[0, 1] += 0.125
    l2, largest = findings((plain, plain, truth), (got, plain, truth))
    assert (l2.norm, largest.norm) == ("l2", "max") and l2.worst == largest.worst == (1, 0)
    assert largest.scale == 4.0 and l2.scale == pytest.approx(math.sqrt(25.3125))
    assert largest.error == pytest.approx(math.sqrt((0.25 + 0.125**2) / 2))
    assert largest.budget == pytest.approx(2 * 0.125 + 4 * unit_roundoff(torch.float32))
    between = findings((off_by(0, torch.bfloat16), off_by(0, torch.bfloat16), ONES + 2.0**-9))
    assert [f.error for f in between] == [8 * 2.0**-9, 2.0**-9], "the truth is not rounded to the dtype of got"


def test_a_finding_passes_up_to_its_budget() -> None:
    assert Finding("x", "l2", 2.0, 2.0).passed and not Finding("x", "l2", math.nextafter(2.0, 3.0), 2.0).passed
    assert not Finding("x", "l2", math.nan, 2.0).passed and not Finding("x", "l2", math.inf, 1e300).passed
    assert [Finding("x", "l2", e, b).ratio for e, b in ((0, 0), (1, 4), (6, 4), (1, 0), (math.inf, 4))] == [
        0.0, 0.25, 1.5, math.inf, math.inf,
    ]  # fmt: skip
    assert Finding("x", "deviation", 5.0, math.inf).measured and not Finding("x", "l2", 5.0, 6.0).measured


def test_bits_that_differ_are_counted() -> None:
    one = torch.tensor([[1.0, -0.0], [2.0, math.nan]])
    other = torch.tensor([[1.0, 0.0], [3.0, math.nan]])
    found = differing("x", one, other)
    assert (found.error, found.budget, found.worst, found.scale) == (2.0, 0.0, (1, 0), 4.0), "NaN differs from everything"
    assert differing("x", one[0], one[0].clone()).passed and differing("x", None, None).passed
    assert not differing("x", one, None).passed and not differing("x", None, one).passed
    for form in (one.double(), one[0]):
        assert differing("x", one, form).error == math.inf and "then" in differing("x", one, form).note


def test_verdict_needs_findings() -> None:
    good, bad = Finding("x", "l2", 1.0, 2.0), Finding("x", "l2", 3.0, 2.0)
    assert (judged([good, good]), judged([good, bad]), judged([bad, good])) == ("pass", "fail", "fail")
    with pytest.raises(ValueError, match="judged nothing"):
        judged([])
    for status, found in (("pass", (good, bad)), ("pass", (bad, good)), ("pass", ()), ("fail", (good,)), ("fail", ())):
        with pytest.raises(ValueError):
            Record("scan", "mine", "ours", "forward", "c", "float32", status, findings=found)
    for status in ("error", "oom", "timeout", "skip"):
        record = Record("scan", "mine", "ours", "forward", "c", "float32", status, reason="why")
        assert record.failed == (status != "skip")
        with pytest.raises(ValueError, match="says why"):
            Record("scan", "mine", "ours", "forward", "c", "float32", status)


def test_the_worst_of_parts_is_kept_and_every_failing_one() -> None:
    def found(part: str, error: float, norm: str = "l2") -> Finding:
        return Finding(f"y[{part}]", norm, error, 4.0)

    kept = worst_of([found("0:3", 1.0), found("3:7", 3.0), found("7:9", 2.0), found("0:3", 0.5, "max")])
    assert kept == [found("3:7", 3.0), found("0:3", 0.5, "max")]
    assert worst_of([found("0:3", 5.0), found("3:7", 3.0), found("7:9", 6.0)]) == [found("0:3", 5.0), found("7:9", 6.0)]


def test_a_record_keeps_its_worst_finding_and_its_line() -> None:
    given = (Finding("a", "l2", 1, 4), Finding("b", "max", 9, 3, 2, (1, 2), "n", (0.5,)), Finding("c", "l2", math.inf, 0))
    record = Record("scan", "mine", "rival", "forward", "c", "float32", "fail", 1.5, "", given, "again")
    assert record.worst == given[2] and Record.parse(record.line()) == record
    assert record.key == ("scan", "mine", "forward", "c")
    within = Finding("a", "l2", 3, 99), Finding("b", "l2", 2, 4)
    nearly = Record("scan", "mine", "ours", "forward", "c", "float32", "pass", findings=within)
    assert nearly.worst is not None and nearly.worst.tensor == "b"


def test_few_values_are_pooled_over_more_seeds() -> None:
    """4096 values are enough for four seeds; fewer take sixteen, of which eight in a row share a draw."""
    small, large = (Case("scan", (("B", 1), ("L", length), ("E", 64), ("N", 4))) for length in (63, 64))
    assert (len(seeds(small)), len(seeds(large))) == (16, 4) and is_jittered(small) and not is_jittered(large)
    exact = Case("scan", small.dims, dtype="float64")
    assert len(seeds(exact)) == 4 and not is_jittered(exact)
