"""A failure leads to the bug: the first wrong token of either direction, the edge it is at, the shortest length that fails."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import fused
from harness.cli.app import app
from harness.judge import locate as module
from harness.judge import parity
from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.locate import describe_edge, locate, shortest_failing
from harness.judge.registry import mutants
from harness.judge.trial import Trial
from harness.mutants import lose_state_at_tile
from harness.records.finding import Finding
from harness.records.location import Location, WrongTokens
from harness.records.record import Record
from harness.runs.store import Run
from harness.subjects import mixer, scan, scan_both, videomamba

pytestmark = pytest.mark.usefixtures("prepared", "undrawn", "unchecked")


def case(*options: str, subject: str = "scan", dtype: str = "float32", L: int = 40, **sizes: int) -> Case:
    dims = {"B": 2, "L": L} | (sizes or {"E": 64, "N": 4})
    return Case(subject, tuple(dims.items()), options, dtype)


def located(where: Case, call: Callable[..., Any], grad: bool = False, backend: str | None = None) -> Location:
    trial, mine = Trial(where, "cpu"), Implementation("mine", call, backend=backend)
    findings = trial.judge(mine, grad)
    assert not all(f.passed for f in findings)
    found = locate(trial, mine, findings)
    assert found is not None
    return found


def loses_its_state(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return lose_state_at_tile.bug(faulty.scan, *args, **{"D": None, "z": None, "delta_bias": None} | _named(args, options))


def _named(args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    assert len(args) == 5
    return options


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bug_at_a_tile_edge_is_located(dtype: str) -> None:
    """Of the native kernels, which divide the tokens into tiles of 16: both by the first wrong token and by the length."""
    found = located(case(dtype=dtype), loses_its_state, backend="native")
    [y] = [tokens for tokens in found.tokens if tokens.tensor == "y"]
    assert (y.unit, y.total, y.first) == ("token", 40, 16) and y.last > 20
    assert str(y).startswith(f"y: {y.count} of 40 tokens are wrong, 16 to {y.last}; the first forwards is token 16, ")
    assert y.edge_forwards == "the first after the edge at 16 (tiles of 16)" and y.edge_forwards in str(y)
    assert found.shortest == 17
    edge = "and the last of them is the first after the edge at 16 (tiles of 16)"
    assert found.lengths.startswith(f"the first 17 tokens fail, 16 pass, {edge}; so do 18, ")


def test_in_reverse_order_the_edge_is_met_from_behind() -> None:
    found = located(case("reverse"), loses_its_state, backend="native")
    [y] = [tokens for tokens in found.tokens if tokens.tensor == "y"]
    assert (y.first, y.last) == (0, 31) and y.edge_backwards == "the first after the edge at 32 (tiles of 16)"
    assert "forwards" not in str(y) and "the first backwards is token 31, the first after the edge at 32" in str(y)
    assert found.shortest == 17 and found.lengths.startswith("the first 17 tokens in reverse order fail, 16 pass")


def test_gradients_are_wrong_on_the_other_side_of_the_edge() -> None:
    found = located(case(), loses_its_state, grad=True, backend="native")
    names = [tokens.tensor for tokens in found.tokens]
    assert names[0] == "y" and len(names) == module.MAX_TENSORS and found.shortest == 17
    behind = [t for t in found.tokens if t.tensor in ("grad u", "grad B")]  # what a later token would have seen of it
    assert behind and all((t.first, t.last) == (0, 15) and "edge at 16" in t.edge_backwards for t in behind)


def changes(token: int, *lengths: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """A scan whose y is wrong from a token on, at these lengths only, or at all that have the token."""

    def call(u: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        y, state = faulty.scan(u, *args, **options)
        right = torch.arange(u.shape[1])[:, None] < token if not lengths or u.shape[1] in lengths else torch.tensor(True)
        return torch.where(right, y, y + 1), state

    return call


@pytest.mark.parametrize(
    ("call", "shortest", "said"),
    [
        (changes(0), 1, "the first token fails by itself; so do 2, 3, 4"),
        (changes(21), 22, "the first 22 tokens fail, 21 pass; so do 23"),
        (changes(0, 40), 40, "only all 40 tokens fail (1, 2, 3, 4, "),
        (changes(0, 15, 40), 15, "the first 15 tokens fail, 14 pass; 16, 31, 32 pass again"),
        (changes(32), 33, "the first 33 tokens fail, 32 pass, and the last of them is the first after 32, a multiple of 32"),
    ],
)  # fmt: skip
def test_from_which_length_on_it_fails(call: Callable[..., Any], shortest: int, said: str) -> None:
    found = located(case(), call)
    assert found.shortest == shortest and said in found.lengths, found.lengths


def test_wrong_tokens_in_the_middle_have_two_ends() -> None:
    def call(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        y, state = faulty.scan(*args, **options)
        y = y.clone()
        y[:, 5:24] = float("nan")
        return y, state

    [y] = located(case(), call).tokens
    assert (y.first, y.last, y.count) == (5, 23, 19) and y.edge_backwards == "the first after 24, a multiple of 8"
    assert str(y) == (
        "y: 19 of 40 tokens are wrong, 5 to 23; the first forwards is token 5; "
        "the first backwards is token 23, the first after 24, a multiple of 8"
    )


@pytest.mark.parametrize(("edge", "said"), [(0, ""), (40, ""), (7, ""), (4, ""), (24, "the first after 24, a multiple of 8")])
def test_an_edge_that_no_one_knows(edge: int, said: str) -> None:
    assert describe_edge(edge, 40, {}) == said


def test_the_edges_of_a_scan_are_those_of_its_schedule() -> None:
    assert list(scan.edges(case(), "native", "cpu")["tiles of 16"]) == [0, 16, 32]
    assert scan.edges(case(), "mamba_ssm", "cpu") == {}
    assert list(scan_both.edges(case(subject="scan_both"), "native", "cpu")["tiles of 16"]) == [0, 16, 32]
    assert list(mixer.edges(case(subject="mixer", D=32), "native_kept", "cpu")["tiles of 16"]) == [0, 16, 32]
    parts = scan.edges(case(), "torch", "cpu")
    assert 0 in parts["segments"] and parts["segments"] <= parts["splits of segments"] <= set(range(40))


def test_other_subjects_with_tokens_are_located_too() -> None:
    def norm(*args: Any, **options: Any) -> Any:
        y, residual = fused.add_norm(*args, **options, backend="torch")
        return y, torch.where(torch.arange(y.shape[1])[:, None] < 16, residual, residual * 1.5)

    found = located(case("kind=rms", subject="norm", D=64), norm)
    assert [t.tensor for t in found.tokens] == ["residual_out"] and found.tokens[0].first == 16 and found.shortest == 17

    def both(pairs: dict[str, Any], z: Tensor | None, softplus: bool) -> Tensor:
        y = fused.bidirectional_scan(**pairs, z=z, softplus=softplus, backend="torch")
        return y + (torch.arange(y.shape[1])[:, None] < 32)

    found = located(case(subject="scan_both", E=64, N=4), both)
    assert (found.tokens[0].last, found.shortest) == (31, 1)


def test_a_model_has_positions_and_is_not_cut() -> None:
    """Of a video that is cut by tubelets, one output a patch; of any other one answer for the whole clip."""
    ours = next(i for i in videomamba.implementations() if i.name == "fused:torch")

    def late(config: dict[str, Any]) -> torch.nn.Module:
        model = ours.call(config)
        late = lambda y: y + (torch.arange(y.shape[1])[:, None] >= 2)  # noqa: E731
        model.register_forward_hook(lambda m, inputs, out: (late(out[0]), *out[1:]) if isinstance(out, tuple) else out + 1)
        return model

    sizes = tuple({"B": 2, "T": 4, "S": 32, "D": 32, "L": 17}.items())
    found = located(Case("videomamba", sizes, ("causal", "state", "readout=tokens"), "float32"), late)
    assert found.lines() == ["logits: 14 of 16 positions are wrong, 2 to 15; the first forwards is position 2"]
    assert found.shortest == 0
    trial, mine = Trial(Case("videomamba", sizes, (), "float32"), "cpu"), Implementation("mine", late)
    findings = trial.judge(mine, False)
    assert not findings[0].passed and locate(trial, mine, findings) is None


def test_findings_on_parts_and_other_questions_are_left_alone() -> None:
    trial, mine = Trial(case(), "cpu"), Implementation("mine", changes(3))
    for finding in (Finding("y[3:5]", "l2", 2.0, 1.0), Finding("y", "bitwise", 3.0, 0.0), Finding("y", "l2", 0.5, 1.0)):
        assert locate(trial, mine, [finding]) is None
    assert locate(trial, mine, [Finding("y", "l2", 2.0, 1.0)]) is None  # nothing is known that would cost nothing


def test_a_search_that_takes_too_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEARCH_SECONDS", -1.0)
    found = located(case(), changes(20))
    assert found.shortest == 0 and "was not found within" in found.lengths and found.tokens[0].first == 20


def test_the_search_by_itself() -> None:
    for edge in range(1, 65):
        asked: list[int] = []

        def fails(length: int, edge: int = edge, asked: list[int] = asked) -> bool:
            asked.append(length)
            return length >= edge

        assert shortest_failing(fails, module.candidates(64), 64) == (edge, True) and len(asked) <= 20
    assert shortest_failing(lambda n: None if n > 4 else False, module.candidates(64), 64) == (0, False)


# in a run

WORDS = ("parity", "--grid", "smoke", "--device", "cpu", "--jobs", "1", "--subject", "scan", "--check", "forward")
ONE = (*WORDS, "--case", "B2-L63-E24-N16-float32", "--impl", "fused:torch")


def test_it_is_on_the_terminal_in_the_record_and_in_both_pages(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*ONE, "--mutant", "lose_state_at_tile", "--out", str(tmp_path)])
    assert done.exit_code == 1 and "lose_state_at_tile" in mutants()
    line = "y: 47 of 63 tokens are wrong, 16 to 62; the first forwards is token 16, the first after 16, a multiple of 16"
    assert f"\n    {line}\n    the first 17 tokens fail, 16 pass" in done.output, done.output
    [record] = Run.open(tmp_path).records
    assert record.location is not None and record.location.tokens[0].first == 16 and record.location.shortest == 17
    assert Record.parse(record.line()) == record
    for page in ("report.md", "report.html"):
        text = re.sub(r"<[^>]*>", "", (tmp_path / page).read_text())  # terms within a line are links to the glossary
        assert line in text and "the first 17 tokens fail, 16 pass" in text


def test_what_passes_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "locate", lambda *args: pytest.fail("it was looked for"))
    done = CliRunner().invoke(app, [*ONE, "--out", str(tmp_path)])
    assert done.exit_code == 0 and "location" not in (tmp_path / "records.jsonl").read_text()


def test_what_goes_wrong_while_it_is_looked_for_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("illegal access")

    monkeypatch.setattr(parity, "locate", broken)
    done = CliRunner().invoke(app, [*ONE, "--mutant", "drop_skip", "--out", str(tmp_path)])
    assert done.exit_code == 1 and "not located, RuntimeError: illegal access" in done.output


def test_only_the_first_failures_are_searched_for_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "MAX_SEARCHES", 1)
    words = (*WORDS, "--case", "B3-L7-E10-N16-*float32", "--impl", "fused:torch", "--mutant", "drop_skip")
    CliRunner().invoke(app, [*words, "--out", str(tmp_path)])
    found = [r.location for r in Run.open(tmp_path).records if r.status == "fail"]
    assert len(found) > 2 and found[0].lengths and not any(location.lengths for location in found[1:])
    assert all(location.tokens for location in found)


def test_records_without_a_location_are_read() -> None:
    raw = json.loads(Record("scan", "x", "ours", "forward", "c", "float32", "skip", reason="why").line())
    assert "location" not in raw and Record.parse(json.dumps(raw)).location is None
    assert Location.parse({"tokens": [vars(WrongTokens("y", "token", 9, 1, 3, 3))]}).tokens[0].first == 3
