"""A case under judgement: what truth, plain and got are computed from, which seeds and gradients are asked, what is kept."""

import functools
import os
from collections.abc import Callable

import pytest
import torch
from answers import failing
from torch import Tensor

import reference
from harness.checks import batch, chunks, determinism, gradcheck, layout, strides, writes
from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.request import ParityRequest
from harness.judge.second_process import SecondProcess
from harness.judge.trial import Trial, digest

pytestmark = pytest.mark.usefixtures("prepared")
SIZES = (("B", 2), ("L", 5), ("E", 6), ("N", 4))
LEAVES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def scan_trial(dtype: str = "float32", *options: str, sizes: tuple[tuple[str, int], ...] = SIZES) -> Trial:
    return Trial(Case("scan", sizes, options or ("state",), dtype), "cpu")


def mine(call: Callable) -> Implementation:
    return Implementation("mine", call)


def spied(trial: Trial) -> list[tuple[Tensor, ...]]:
    """The positional arguments that the reference will be called with."""
    seen = []

    def call(*args, **options):
        seen.append(args)
        return reference.selective_scan(*args, **options)

    trial.reference = Implementation("reference", call)
    return seen


def test_the_truth_is_float64_of_the_rounded_inputs() -> None:
    trial = scan_trial("bfloat16")
    seen = spied(trial)
    plain, truth = trial.plain(3, True), trial.truth(3, True)
    [given, exact] = seen
    assert {t.dtype for t in exact} == {torch.float64} and {t.dtype for t in truth.outputs.values()} == {torch.float64}
    assert (given[0].dtype, given[2].dtype, plain.outputs["y"].dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert all(torch.equal(low.double(), wide) for low, wide in zip(given, exact, strict=True))
    leaves = trial.leaves(3)
    assert torch.equal(leaves["u"], given[0]) and set(leaves) == set(LEAVES)
    assert torch.equal(trial.subject.draw(trial.case, 3)["u"].bfloat16(), leaves["u"]) is False, "a small case is jittered"


def test_the_reference_is_asked_once_for_each_seed_and_precision() -> None:
    trial = scan_trial("float16")
    seen = spied(trial)
    for seed in (0, 1):
        for _ in range(2):
            trial.plain(seed, True), trial.truth(seed, True), trial.plain(seed, False), trial.truth(seed, False)
    assert [args[0].dtype for args in seen] == [torch.float16, torch.float64] * 2
    assert trial.knows(0, True) and trial.knows(1, False) and not trial.knows(2, False)
    assert trial.truth(0, True).gradients["u"] is not None
    later = scan_trial("float16")
    spied(later)
    later.truth(0, False)
    assert later.truth(0, True).gradients["u"] is not None, "a result without gradients does not serve where they are asked"


def test_draws_differ_between_seeds_and_are_not_constant() -> None:
    small, large = scan_trial(), scan_trial(sizes=(("B", 2), ("L", 64), ("E", 64), ("N", 4)))
    for name in LEAVES:
        drawn = [small.leaves(seed)[name] for seed in small.seeds]
        for seed in range(1, 8):  # of one draw, each rounded afresh
            assert not torch.equal(drawn[0], drawn[seed]) and torch.allclose(drawn[0], drawn[seed], rtol=0.1)
        assert not torch.allclose(drawn[0], drawn[8], rtol=0.1, atol=0.01), "the ninth seed is another draw"
        several = [large.leaves(seed)[name] for seed in large.seeds]
        assert all(float(x.std()) > 0.01 for x in several)
        assert not any(torch.equal(x, y) for i, x in enumerate(several) for y in several[:i])


def test_cotangents_are_drawn_and_the_truth_has_the_same() -> None:
    trial = scan_trial("bfloat16")
    y = trial.plain(0, True).outputs["y"]
    drawn = {seed: trial.cotangent(seed, "y", y) for seed in (0, 1, 8)}
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[8])
    assert float(drawn[0].float().std()) > 0.5 and drawn[0].dtype == torch.bfloat16
    assert not torch.equal(drawn[0], trial.cotangent(0, "z", y)), "each output has its own"
    wide = trial.cotangent(0, "y", trial.truth(0, True).outputs["y"])
    assert wide.dtype == torch.float64 and torch.equal(wide, drawn[0].double()), "the truth's are those of plain, upcast"
    state = trial.truth(0, True).outputs["final_state"]
    exact = trial.cotangent(0, "final_state", state)
    assert torch.equal(exact, exact.float().double()) and not torch.equal(exact, exact.bfloat16().double())


@pytest.mark.parametrize("seed", [0, 7, 15])
def test_every_seed_is_judged(seed: int) -> None:
    trial = scan_trial()
    wrong_at = trial.leaves(seed)["u"]

    def call(u, *args, **options):
        y, state = reference.selective_scan(u, *args, **options)
        return y + 10.0 * torch.equal(u, wrong_at), state

    found = trial.judge(mine(reference.selective_scan), grad=False)
    assert found and not failing(found)
    assert failing(trial.judge(mine(call), grad=False)) == {"y"}


@pytest.mark.parametrize("name", LEAVES)
def test_the_gradient_of_every_leaf_is_judged(name: str) -> None:
    """One that is a tenth too large is found in training, and not asked for in inference."""
    trial = scan_trial()

    def steeper(x: Tensor) -> Tensor:
        return x + 0.1 * (x - x.detach())

    def call(*args, **options):
        given = {k: a for k, a in zip(LEAVES, args, strict=False) if a is not None} | options
        given[name] = steeper(given[name])
        return reference.selective_scan(**given)

    assert failing(trial.judge(mine(call), grad=False)) == set()
    assert failing(trial.judge(mine(call), grad=True)) == {f"grad {name}"}


def test_what_does_not_come_fails() -> None:
    trial = scan_trial()
    without = mine(lambda u, *args, **options: reference.selective_scan(u.detach(), *args, **options))
    assert "grad u" in failing(trial.judge(without, grad=True))
    evaluate = trial.subject.evaluate
    outputs = evaluate(reference.selective_scan, trial.case, trial.leaves(0))
    assert set(outputs) == {"y", "final_state"}


def test_inputs_are_fresh_for_everyone() -> None:
    trial = scan_trial()
    before = {k: v.clone() for k, v in trial.leaves(0).items()}

    def call(u, *args, **options):
        result = reference.selective_scan(u.clone(), *args, **options)
        with torch.no_grad():
            u.zero_()
        return result

    trial.got(mine(call), 0, grad=False)
    assert all(torch.equal(trial.leaves(0)[k], v) for k, v in before.items())


def test_digests_are_of_outputs_and_gradients() -> None:
    training, inference = scan_trial(), scan_trial("float32", "infer")
    named = training.digests(mine(reference.selective_scan))
    assert set(named) == {"y", "final_state", *(f"grad {k}" for k in LEAVES)} and len(set(named.values())) == len(named)
    assert not any(name.startswith("grad ") for name in inference.digests(mine(reference.selective_scan)))
    x = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    assert digest(x) == digest(x.clone()) == digest(x.mT.contiguous().mT) != digest(x.mT) and digest(None) == "none"
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0])) and digest(x) != digest(x.nextafter(x + 1))
    with pytest.raises(RuntimeError, match="no other process"):
        training.digests_of_second_process("mine")


def of_this_process(*args, **options):
    """The bits depend on the process, and on nothing else."""
    y, state = reference.selective_scan(*args, **options)
    return y * (1 + 1e-3 * (os.getpid() % 1009)), state


def test_determinism_really_asks_another_process() -> None:
    """The other process has the bug that is planted here: its bits are those of the bug, not of what is right."""
    added = ("scan:mine=test_trial:of_this_process",)
    request = ParityRequest("smoke", "cpu", ("scan",), added=added, mutant="drop_skip")
    second, implementations = SecondProcess(request), request.implementations("scan")
    try:
        trial = Trial(Case("scan", SIZES, ("infer",), "float32"), "cpu", second.digests)
        right = trial.digests(implementations["fused:torch"])
        with request.planted():
            found, planted = (determinism.run(trial, implementations[name]) for name in ("mine", "fused:torch"))
            assert trial.digests(implementations["fused:torch"]) != right
    finally:
        second.close()
    assert [(f.tensor, f.note) for f in found if not f.passed] == [("y", "against another process")]
    assert planted and not failing(planted)


def test_determinism_compares_two_calls_and_every_tensor() -> None:
    calls = iter(range(100))

    def drifting(u, *args, **options):
        y, state = reference.selective_scan(u, *args, **options)
        return y + 1e-3 * (1 + next(calls)), state

    good = mine(reference.selective_scan)
    trial = scan_trial()
    trial._second_process = lambda case, name: trial.digests(good)
    assert not failing(determinism.run(trial, good)) and len(determinism.run(trial, good)) == 2 * (2 + len(LEAVES))
    found = determinism.run(trial, mine(drifting))
    assert {(f.tensor, f.note) for f in found if not f.passed} == {("y", ""), ("y", "against another process")}
    for name in ("y", "final_state", "grad u", "grad A"):
        trial._second_process = lambda case, who, name=name: {k: v for k, v in trial.digests(good).items() if k != name}
        assert failing(determinism.run(trial, good)) == {name}, "what the other process does not have differs"


def chunked_with(fault: Callable[[Tensor, int], Tensor], where: str) -> Implementation:
    """A scan whose y or final state gets a fault, which knows the length of the chunk."""

    def call(u, *args, **options):
        y, state = reference.selective_scan(u, *args, **options)
        return (fault(y, u.shape[1]), state) if where == "y" else (y, fault(state, u.shape[1]))

    return mine(call)


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (lambda x, length: x * (1 + 0.1 * (length == 1)), "y"),  # of single tokens, which stand at both ends
        (lambda x, length: x * (1 + 0.1 * (length == 1)), "state"), (lambda x, length: x * (length > 2), "state"),
        (lambda x, length: x.detach() if length < 9 else x, "state"),
    ],
    ids=["short y", "short state", "state dropped", "state detached"],
)  # fmt: skip
def test_chunks_find_a_fault_that_the_whole_does_not_have(fault: Callable, where: str) -> None:
    trial = scan_trial(sizes=(("B", 1), ("L", 9), ("E", 6), ("N", 4)))
    implementation = chunked_with(fault, where)
    assert not failing(trial.judge(implementation, grad=True))
    assert failing(chunks.run(trial, implementation)) and not failing(chunks.run(trial, mine(reference.selective_scan)))


def test_chunks_begin_everywhere_that_matters() -> None:
    case = Case("scan", SIZES)
    for count in (2, 3, 9, 16, 17, 40):
        cuts = chunks.partitions(case, count)
        assert all(c[0] == 0 and list(c) == sorted(set(c)) and c[-1] < count for c in cuts)
        assert tuple(sorted({0, 1, count - 1})) in cuts, "one unit at each end"
        assert (tuple(range(count)) in cuts) == (count <= 16)
    x = torch.arange(11)
    assert [chunks.cut(x, 0, a, b, 5).tolist() for a, b in ((0, 1), (1, 4), (4, 5))] == [[0, 1, 2], [3, 4, 5, 6, 7, 8], [9, 10]]


@pytest.mark.parametrize(
    ("name", "misread"),
    [
        ("transposed", lambda u: u.as_strided(u.shape, (u.shape[1] * u.shape[2], u.shape[2], 1), u.storage_offset())),
        *((name, lambda u: u.as_strided(u.shape, u.stride(), 0)) for name in ("odd", "second_half", "columns")),
        ("apart", lambda u: u.as_strided(u.shape, (*u.stride()[:2], 1))),
        ("reversed_axes", lambda u: u.as_strided(u.shape, tuple(sorted(u.stride())[::-1]), u.storage_offset())),
    ],
)  # fmt: skip
def test_each_layout_finds_what_takes_it_for_another(name: str, misread: Callable[[Tensor], Tensor]) -> None:
    """One that would only pass in this layout by accident: it reads where the values of another would lie."""
    trial = scan_trial("float32", "for=strides", sizes=(("B", 2), ("L", 3), ("E", 198), ("N", 4)))
    wrong = mine(lambda u, *args, **options: reference.selective_scan(misread(u), *args, **options))
    assert any(f.startswith("y[") for f in failing(strides.in_layout(trial, wrong, name, strides.LAYOUTS[name])))
    placed = strides.LAYOUTS[name](x := torch.randn(2, 3, 198))
    assert torch.equal(placed, x) and (not placed.is_contiguous() or placed.storage_offset() == 1)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_expanded_tensors_have_a_truth_of_their_own(axis: int) -> None:
    x = strides.expanded(torch.randn(2, 3, 5), axis)
    assert x.shape == (2, 3, 5) and x.stride(axis) == 0
    trial = scan_trial("float32", "for=strides", sizes=(("B", 2), ("L", 3), ("E", 198), ("N", 4)))
    place = functools.partial(strides.expanded, axis=axis)

    def dense(u, *args, **options):
        return reference.selective_scan(torch.zeros_like(u) + u * (u.stride(axis) != 0), *args, **options)

    assert not failing(strides.in_layout(trial, mine(reference.selective_scan), "x", place, same_values=False))
    assert failing(strides.in_layout(trial, mine(dense), "x", place, same_values=False))


def test_batches_have_the_clip_at_both_ends_and_beside_nan() -> None:
    assert {place for _, place, _ in batch.BATCHES} >= {0, 1} and any(place == size - 1 for size, place, _ in batch.BATCHES)
    assert any(size > 32 for size, _, _ in batch.BATCHES) and any(factor != factor for _, _, factor in batch.BATCHES)
    for size in (2, 3, 5, 8, 33):

        def call(u, *args, size=size, **options):
            y, state = reference.selective_scan(u, *args, **options)
            return (y + 1e-3 if len(u) == size else y), state

        assert failing(batch.run(scan_trial(), mine(call))), f"only batches of {size} differ"


def test_a_layer_with_another_state_dict_is_found() -> None:
    def changed(change: Callable) -> Implementation:
        class Changed(reference.Mamba):
            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                change(self)

        return mine(Changed)

    trial = Trial(Case("mixer", (("B", 2), ("L", 3), ("D", 16))), "cpu")
    changes = {
        "renamed": lambda m: m.__setattr__("norm", torch.nn.LayerNorm(4)), "missing": lambda m: m.__delattr__("out_proj"),
        "transposed": lambda m: m.__setattr__("A_log", torch.nn.Parameter(torch.empty(m.A_log.shape[::-1]))),
        "dtype": lambda m: m.__setattr__("D", torch.nn.Parameter(torch.empty(m.D.shape, dtype=torch.float16))),
    }  # fmt: skip
    for name, change in changes.items():
        assert failing(layout.run(trial, changed(change))), name
    assert not failing(layout.run(trial, mine(reference.Mamba)))


@pytest.mark.parametrize("name", ["u", "A", "delta_bias", "initial_state"])
def test_gradcheck_finds_a_slope_that_is_not_the_gradient(name: str) -> None:
    trial = scan_trial("float64", sizes=(("B", 1), ("L", 3), ("E", 2), ("N", 3)))

    def call(*args, **options):
        given = {k: a for k, a in zip(LEAVES, args, strict=False) if a is not None} | options
        given[name] = given[name] + 1e-4 * (given[name] - given[name].detach())
        return reference.selective_scan(**given)

    assert not failing(gradcheck.run(trial, mine(reference.selective_scan)))
    assert failing(gradcheck.run(trial, mine(call))) == {f"grad {name}"}


def test_gradcheck_sees_a_missing_gradient_and_every_seed() -> None:
    trial = scan_trial("float64", sizes=(("B", 1), ("L", 3), ("E", 2), ("N", 3)))
    wrong_at = trial.leaves(2)["u"]

    def without(u, *args, **options):
        return reference.selective_scan(u.detach(), *args, **options)

    def wrong_once(u, *args, **options):
        steep = u + 0.1 * (u - u.detach()) * torch.equal(u.detach(), wrong_at)
        return reference.selective_scan(steep, *args, **options)

    assert failing(gradcheck.run(trial, mine(without))) == failing(gradcheck.run(trial, mine(wrong_once))) == {"grad u"}


def test_a_neighbour_is_another_clip() -> None:
    """A fault that copies of the same clip do not show, where the case has one clip only."""

    def call(u, delta, *args, initial_state, mixed=0.0, **options):
        y = u * delta  # the same bits in any batch
        return y + mixed * (y.roll(1, 0) - y).nan_to_num().detach(), initial_state * 2

    trial = scan_trial(sizes=(("B", 1), *SIZES[1:]))
    assert failing(batch.run(trial, mine(call))) == set()
    assert "y[1 of 2]" in failing(batch.run(trial, mine(functools.partial(call, mixed=1e-3))))


def test_unwritten_memory_is_found_by_nan_where_large_numbers_are_cut_off() -> None:
    calls = []

    def call(*args, **options):
        y, state = reference.selective_scan(*args, **options)
        hole = torch.zeros_like(y, dtype=torch.bool)
        hole.view(-1)[-1] = True
        left = torch.empty_like(y) if calls else torch.zeros_like(y)  # the first is in fresh memory
        calls.append(1)
        return torch.where(hole, torch.where(left.isfinite(), 0.0, left), y), state

    before = torch.utils.deterministic.fill_uninitialized_memory
    assert failing(writes.run(scan_trial(), mine(call))) == {"y"}
    assert torch.utils.deterministic.fill_uninitialized_memory == before


def test_outputs_are_judged_in_training_and_against_the_truth() -> None:
    trial = scan_trial()

    def beside(*args, **options):
        y, state = reference.selective_scan(*args, **options)
        return y + 1, state

    assert failing(trial.judge(mine(beside), grad=True)) == {"y"}
    own = {f.tensor: f.error for f in trial.judge(mine(reference.selective_scan), grad=True)}
    assert all(error > 0 for error in own.values()), "plain itself is not the truth"


def test_a_chunk_is_held_to_its_own_size() -> None:
    """An error of two and a half roundings in a single token is lost in the norms of the whole."""
    trial = scan_trial(sizes=(("B", 1), ("L", 40), ("E", 6), ("N", 4)))
    wrong = chunked_with(lambda y, length: y * (1 + 2.5 * 9 * 2.0**-24 * (length == 1)), "y")
    found = failing(chunks.run(trial, wrong))
    assert found & {f"y[{i}:{i + 1}]" for i in range(40)}
