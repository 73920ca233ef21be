"""Each symmetry that the check asks finds an operator that breaks it, and no operator that does not."""

from collections.abc import Callable

import pytest
import torch

import reference
from harness.checks import invariants
from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.registry import mutants, subjects
from harness.judge.trial import Trial

pytestmark = pytest.mark.usefixtures("prepared")
ASKED = ("scan", "scan_both", "ssd", "conv", "mixer")
CASES = [case for name in ASKED for case in subjects()[name].special_cases("invariants", "smoke")]
SCAN = Case("scan", (("B", 2), ("L", 9), ("E", 6), ("N", 4)), ("state", "for=invariants"), "float32")


def failing(case: Case, call: Callable) -> set[str]:
    """The relations that fail."""
    found = invariants.run(Trial(case, "cpu"), Implementation("mine", call))
    return {f.tensor.partition("[")[2][:-1] for f in found if not f.passed}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.subject}-{case.name}")
def test_what_is_right_keeps_them(case: Case) -> None:
    calls = {i.name: i.call for i in subjects()[case.subject].implementations()}
    for name in ("reference", "fused:torch"):
        assert failing(case, calls[name]) == set(), name


def scan_with(change: Callable) -> Callable:
    """A scan whose arguments and results go through `change(scan, u, delta, state, rest, options)`."""

    def call(u, delta, *rest, initial_state, **options):
        def scan(u, delta, state):
            return reference.selective_scan(u, delta, *rest, initial_state=state, **options)

        return change(scan, u, delta, initial_state, options)

    return call


def bends(scan, u, delta, state, options):
    return scan(u + 1e-3 * u * u.abs(), delta, state)


def mixes_tokens(scan, u, delta, state, options):
    return scan(u + 1e-3 * u.roll(1, 1).abs() * u.sign(), delta, state)


def favours_the_first_token(scan, u, delta, state, options):
    y, final = scan(u, delta, state)
    first = torch.zeros_like(y)
    first[:, 0] = 1e-3 * y[:, 0]
    return y + first, final


def forgets_while_it_stands_still(scan, u, delta, state, options):
    y, final = scan(u, delta, state)
    return y, final * 0.999


def sees_one_direction_better(scan, u, delta, state, options):
    y, final = scan(u, delta, state)
    return y * (1.001 if options.get("reverse") else 1.0), final


def loses_the_state(scan, u, delta, state, options):
    return scan(u, delta, state * (u.shape[1] != 5))


def sees_its_neighbour(scan, u, delta, state, options):
    y, final = scan(u, delta, state)
    return torch.cat((y[:1], y[1:] + 1e-3 * y[:1])), final


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (bends, "homogeneity"), (mixes_tokens, "superposition"), (favours_the_first_token, "shift"),
        (forgets_while_it_stands_still, "identity"),
        (sees_one_direction_better, "reversal"), (loses_the_state, "concatenation"), (sees_its_neighbour, "permutation"),
    ],
)  # fmt: skip
def test_each_relation_finds_what_breaks_it(change: Callable, found: str) -> None:
    assert found in failing(SCAN, scan_with(change))


@pytest.mark.parametrize("bug", ["drop_state_once", "lose_state_at_tile"])
def test_planted_bugs_are_found_without_a_reference(bug: str) -> None:
    """A bug that the reference shared would be found too: nothing is compared with it."""
    case = next(c for c in CASES if c.subject == "scan" and c.dtype == "float32")
    with mutants()[bug].plant():
        call = {i.name: i.call for i in subjects()[case.subject].implementations()}["fused:torch"]
        assert failing(case, call)


def test_directions_that_are_no_mirror_images_are_found() -> None:
    """The second one skips by the first one's D."""
    case = next(c for c in CASES if c.subject == "scan_both" and c.dtype == "float32" and not c.has("bare"))
    [both] = [i.call for i in subjects()["scan_both"].implementations() if i.name == "reference"]

    def one_skip(pairs, z, softplus):
        return both(pairs | {"D": (pairs["D"][0], pairs["D"][0])}, z, softplus)

    assert failing(case, one_skip) == {"reversal"}
