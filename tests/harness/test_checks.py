"""Each check finds what is wrong, and finds nothing where nothing is."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import faulty
import pytest
import torch
from answers import failing, ours
from packaging.version import Version
from torch import Tensor
from typer.testing import CliRunner

from harness.checks import batch, compile, device, extremes, strides, writes
from harness.cli.app import app
from harness.instruments import huge_tensors, real_module
from harness.judge.case import Case
from harness.judge.check import CannotAsk
from harness.judge.implementation import Implementation
from harness.judge.protocols import HasSpecialCases
from harness.judge.registry import mutants, subjects
from harness.judge.request import ParityRequest
from harness.judge.trial import Trial
from harness.records.finding import Finding

ODD = {"B": 3, "L": 7, "E": 10, "N": 4}
WIDE = {"E": 198}  # as few tokens, but so many values that a quarter of the seeds is enough


pytestmark = pytest.mark.usefixtures("prepared")


def scan_case(*options: str, dtype: str = "float32", **dims: int) -> Case:
    return Case("scan", tuple((ODD | dims).items()), options, dtype)


def asked(check: ModuleType, call: str, case: Case) -> list[Finding]:
    return check.run(Trial(case, "cpu"), Implementation("mine", getattr(faulty, call)))


def special_cases(check: str, grid: str) -> list[Case]:
    return [c for s in subjects().values() if isinstance(s, HasSpecialCases) for c in s.special_cases(check, grid)]


@pytest.mark.parametrize("options", [(), ("reverse", "state"), ("groups=2",)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("check", [batch, writes, strides])
def test_finds_nothing_in_a_good_scan(check: ModuleType, dtype: str, options: tuple[str, ...]) -> None:
    assert not failing(asked(check, "scan", scan_case(*options, dtype=dtype, **(WIDE if check is strides else {}))))


@pytest.mark.parametrize(
    ("check", "call", "where"),
    [
        (batch, "leaks_from_neighbours", "y["), (batch, "multiplies_neighbours_by_zero", "final_state["),
        (writes, "leaves_the_last_unwritten", "y"), (writes, "hides_what_is_unwritten", "y"),
        (writes, "writes_beside", "beside "), (writes, "overwrites_cotangent", "cotangent y"),
        (writes, "remembers_the_last_call", "y"), (strides, "reads_dense_cotangents", "grad u["),
    ],
)  # fmt: skip
def test_finds_the_fault(check: ModuleType, call: str, where: str) -> None:
    found = failing(asked(check, call, scan_case("state", **(WIDE if check is strides else {}))))
    assert found and any(name.startswith(where) for name in found), found


def test_batch_runs_in_the_mode_that_it_is_about() -> None:
    """Without the mode the fault is found, with it there is none; parameters' gradients are left out."""

    class Mode:
        on = False

        def __enter__(self):
            Mode.on = True

        def __exit__(self, *error):
            Mode.on = False

    def call(u: Tensor, *args, **options):
        return (faulty.scan if Mode.on else faulty.leaks_from_neighbours)(u, *args, **options)

    trial, mine = Trial(scan_case(), "cpu"), Implementation("mine", call)
    assert failing(batch.run(trial, mine))
    found = batch.run(trial, replace(mine, batch_invariant=Mode))
    assert not failing(found) and not any("grad A" in f.tensor for f in found)


@pytest.mark.parametrize("options", [("clips=20",), ("clips=20", "reverse"), ("periods=20", "infer")])
def test_huge(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What wraps around is found; on a box without room nothing is asked."""
    case = scan_case(*options, "for=strides", dtype="bfloat16", B=1, L=17, E=252, N=1)
    with pytest.raises(CannotAsk, match="GiB are free"):
        asked(strides, "scan", case)
    monkeypatch.setattr(huge_tensors, "require_room", lambda trial: None)
    assert not failing(asked(strides, "scan", case))
    assert any(name.startswith("y[") for name in failing(asked(strides, "counts_too_short", case)))


def test_huge_cases_are_beyond_32_bits() -> None:
    largest = [case for case in special_cases("strides", "full") if huge_tensors.repetitions(case)]
    for case in largest:
        sizes = dict(case.dims)
        width = sizes["H"] * sizes["P"] if "H" in sizes else sizes.get("E", sizes.get("D", 1))
        assert huge_tensors.repetitions(case) * sizes["L"] * width > 2**31
    assert {case.subject for case in largest} == {"scan", "conv", "norm", "ssd"}
    assert not any(huge_tensors.repetitions(case) for case in special_cases("strides", "smoke"))


def test_extremes_of_every_kind_pass_and_their_faults_do_not() -> None:
    scans = [c for c in special_cases("extremes", "smoke") if c.subject == "scan"]
    nan, length = (next(c for c in scans if c.has(word)) for word in ("nan", "length"))
    for case in (nan, length):
        assert not failing(asked(extremes, "scan", case))
    assert any(name == "y[NaN in u]" for name in failing(asked(extremes, "swallows_nan", nan)))
    assert "y" in failing(asked(extremes, "drifts", length))
    assert max(c["L"] for c in special_cases("extremes", "full")) > 100_000


def test_cases_of_a_check_are_asked_by_it_alone() -> None:
    request = ParityRequest("full", "cpu", ("scan",))
    for case in request.selected_cases():
        checks = {name for name, _, _ in request.questions(case)}
        assert checks and (case.only_check == "" or checks == {case.only_check}), case.name
    forward_only = ParityRequest("full", "cpu", ("scan",), ("forward",))
    assert not any(c.only_check for c in forward_only.selected_cases())


def test_opcheck_of_registered_ops() -> None:
    """A fake implementation of another shape than the op's is found; without registered ops nothing is asked."""

    @torch.library.custom_op("faulty::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    trial = Trial(scan_case(), "cpu")
    mine = Implementation("mine", faulty.scan, samples=lambda case, leaves: [(twice, (leaves["u"].detach(),), {})])
    twice.register_fake(lambda x: x.new_empty(1, *x.shape))
    assert any("faketensor" in name for name in failing(compile.registered(trial, mine)))
    twice.register_fake(lambda x: torch.empty_like(x))
    assert not failing(compile.registered(trial, mine))
    with pytest.raises(CannotAsk, match="registers no ops"):
        compile.registered(trial, Implementation("mine", faulty.scan))


@pytest.mark.usefixtures("unchecked")  # what checks signatures cannot be compiled
@pytest.mark.filterwarnings("ignore:Dynamo detected")
def test_what_is_no_whole_graph_fails(tmp_path: Path) -> None:
    words = "parity --grid smoke --device cpu --jobs 1 --subject conv --case B3-L7-*-reverse-state-float32 --check compile"
    added = ("--with", "conv:mine=faulty:conv_that_breaks_the_graph", "--impl", "mine", "--out", str(tmp_path))
    done = CliRunner().invoke(app, [*words.split(), *added])
    assert done.exit_code == 1 and "FAIL (ours) compile" in done.output and "fullgraph compile inf" in done.output, done.output


@pytest.mark.filterwarnings("ignore:Dynamo detected")
def test_what_declines_a_case_is_not_asked_to_compile_it() -> None:
    def declines(*args: object, **options: object) -> None:
        raise NotImplementedError("no reverse")

    case = Case("conv", (("B", 3), ("L", 7), ("E", 16), ("K", 4)), ("reverse",), "float32")
    with pytest.raises(NotImplementedError, match="no reverse"):
        compile.run(Trial(case, "cpu"), Implementation("mine", declines))


def test_scan_of_ours_says_that_it_cannot_be_one_graph() -> None:
    with pytest.raises(CannotAsk, match="registers no ops.*does not declare fullgraph.*needs a GPU"):
        compile.run(Trial(scan_case(), "cpu"), ours("scan"))


@pytest.mark.usefixtures("unchecked")  # what checks signatures cannot be compiled
@pytest.mark.filterwarnings("ignore:Dynamo detected")
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.11"), reason="Dynamo cannot trace functions whose signatures these tests check"
)
@pytest.mark.parametrize(
    ("part", "call", "where"),
    [
        ("second_batch", "conv_compiled_for_three_clips", {"graphs for batch 4"}),
        ("compiled", "conv_wrong_in_inference", {"y[inference]"}),
    ],
)  # fmt: skip
def test_finds_the_fault_of_a_compiled_call(part: str, call: str, where: set[str]) -> None:
    trial = Trial(Case("conv", (("B", 3), ("L", 7), ("E", 16), ("K", 4)), (), "float32"), "cpu")
    ask = getattr(compile, part)
    assert failing(ask(trial, Implementation("mine", getattr(faulty, call)))) == where
    assert not failing(ask(trial, ours("conv")))


def mixer_trial() -> tuple[Trial, Implementation]:
    return Trial(Case("mixer", (("B", 2), ("L", 3), ("D", 16)), (), "float32"), "cpu"), ours("mixer")


def test_weights_that_were_packed_once_are_found_after_a_step_and_a_loading() -> None:
    assert not failing(compile.lived(*mixer_trial()))
    with mutants()["keep_packed_weights"].plant():
        found = failing(compile.lived(*mixer_trial()))
    assert found == {f"out[eager, inference, {event}]" for event in ("after a step", "after load_state_dict")}


def test_a_result_that_was_captured_as_a_constant_is_found_with_new_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a graph that does not copy its input: what it returns is right for the first batch only."""

    def eager(module: torch.nn.Module, grad: bool) -> Callable[..., Tensor]:
        results: dict[torch.Size, Tensor] = {}

        def call(tokens: Tensor) -> Tensor:
            if grad:
                return module(tokens)
            return results.setdefault(tokens.shape, module(tokens))

        return call

    monkeypatch.setattr(real_module, "eager", eager)
    found = failing(compile.lived(*mixer_trial()))
    assert found == {f"out[eager, inference, {event}]" for event in ("new data", "after a step", "after load_state_dict")}


def test_a_mask_that_is_drawn_once_is_found() -> None:
    sizes = {"B": 2, "T": 2, "S": 32, "D": 32, "L": 9}
    trial = Trial(Case("videomamba", tuple(sizes.items()), ("for=compile",), "float32"), "cpu")
    torch_model = ours("videomamba")
    assert not failing(compile.drawn(trial, torch_model))
    with mutants()["keep_random_mask"].plant():
        assert failing(compile.drawn(trial, torch_model)) == {"outputs of 8 random calls"}


@pytest.mark.parametrize("part", [compile.replayed, compile.reduced_overhead, compile.lived_compiled])
def test_graphs_are_asked_on_a_gpu_only(part: Callable[..., list[Finding]]) -> None:
    trial, torch_mixer = mixer_trial()
    with pytest.raises(CannotAsk, match="a CUDA graph needs a GPU"):
        part(trial, replace(torch_mixer, table=None))


def test_device_that_is_not_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none here: the CPU plays it."""
    case = scan_case("reverse", "state")
    with pytest.raises(CannotAsk, match="only one cpu"):
        asked(device, "scan", case)
    monkeypatch.setattr(device, "other_device", lambda device: "cpu")
    assert not failing(asked(device, "scan", case))
    assert "y" in failing(asked(device, "changes_with_every_call", case))
    numbers = iter((0, 1))
    monkeypatch.setattr(device, "current_index", lambda: next(numbers))
    assert failing(asked(device, "scan", case)) == {"current device"}
    monkeypatch.setattr(device, "current_index", lambda: 0)
    monkeypatch.setattr(device, "device_of", lambda tensor: "cuda:0" if tensor.shape == (3, 7, 10) else "cpu")
    assert failing(asked(device, "scan", case)) == {"y", "grad u", "grad delta", "grad z"}


def test_other_device_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CannotAsk, match="two GPUs"):
        device.other_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(device, "current_index", lambda: 1)
    assert device.other_device("cuda") == "cuda:0"
