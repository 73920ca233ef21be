"""The page of a sweep: licences before speeds, what has no licence has no figure, the same run gives the same bytes."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import sweeps

from harness.bench import grids
from harness.records.finding import Finding
from harness.records.record import Record
from harness.records.speed import Entry, Point, Speed
from harness.report import (
    accepted,
    bench,
    curves,
    faults,
    figures,
    overview,
    paper,
    speed_figures,
    speed_tables,
    things,
)  # fmt: skip
from harness.report import parity as page
from harness.report.html import html, write_both
from harness.runs.store import Run

NATIVE, SDPA = Entry("videomamba", "fused:native", "ours", variant="tiny"), Entry("vit", "sdpa", "rival", variant="tiny")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    """A run with everything in it, rendered."""
    tiny = [s for s in sweeps.models() if s.point.race == "tiny" and s.point.mode == "infer"]
    scan = [s for s in sweeps.operators() if s.point.race == "scan"]
    run = sweeps.made(tmp_path_factory.mktemp("sweep") / "run", [*scan, *tiny])
    assert bench.write(run) == run.folder / "report.md"
    return run


def said(run: Run) -> str:
    return (run.folder / "report.md").read_text()


def made(tmp_path, speeds=(), *rest, **about) -> str:
    run = sweeps.made(tmp_path / "run", speeds, *rest, **about)
    return bench.write(run).read_text()


def test_the_same_run_gives_the_same_bytes(whole) -> None:
    first = {f.name: f.read_bytes() for f in whole.folder.iterdir()}
    stems = {"models-infer-tiny-B1-S224-bfloat16", "roofline-infer", "paper-throughput", "report"}
    assert {name.partition(".")[0] for name in first} >= stems
    bench.write(Run.open(whole.folder))
    assert {f.name: f.read_bytes() for f in whole.folder.iterdir()} == first


def test_the_first_screen_says_what_was_found_then_sections_in_a_readers_order(whole) -> None:
    text, lines = said(whole), said(whole).splitlines()
    assert lines[0] == f"# Bench on NVIDIA H200, grid full, {whole.about['started'][:10]}"
    assert lines[2] == (
        "VideoMamba-Ti is 4.0 to 10 times as fast as upstream in inference and faster than a ViT of similar size from 7,740 "
        "tokens (39 frames) on. 6 of 36 points of ours failed."
    )
    assert "as fast as upstream: VideoMamba-Ti, inference, batch 1" in text and "| 4.0 to 10x | 7,740 tokens |" in text
    assert text.index("](models-infer-tiny-B1-S224-bfloat16.svg)") < text.index("- [How fast](#how-fast)")
    heads = ["## How fast", "## How much memory", "## How right", "## How it was", "## What failed", "## Derived", "## The box"]
    heads += ["## How to repeat", "## Glossary"]
    assert [text.index(f"\n{h}") for h in heads] == sorted(text.index(f"\n{h}") for h in heads)
    assert "| backward | 1 pass | **1 FAILED** of 1 | - |" in text
    where = "From a checkout of commit `f00d`, after `pip install -e .[harness]`:"
    assert f"## How to repeat it\n\n{where}\n\n```\npython -m harness bench\n```\n" in text
    assert (
        "| copy, read plus written | 4,230 GB/s |" in text and "| matrix product in the points' dtype | 795 TFLOP/s |" in text
    )
    assert not any(word in text.lower() for word in ("gated", "licence", "implied", "budgets wrong"))


def test_what_failed_parity_is_said_and_has_no_time(whole) -> None:
    text = said(whole)
    why = "parity backward failed in B2-L197-E384-N16-bfloat16: u.grad is wrong by 3 budgets"
    assert f"Not timed, because parity failed:\n\n- scan fused:native, 6 points: {why}" in text
    rows = [line for line in text.splitlines() if "| train | scan fused:native |" in line]
    assert len(rows) == 6
    for row in rows:
        assert row.endswith(f"| train | scan fused:native | **not timed**: {why} | - | - | - |  |")
    [caption] = re.findall(r"!\[(.*)\]\(operators-train.svg\)", text)
    assert "ours: not timed: failed parity (6 points)" in caption


def test_a_rival_outside_the_budget_is_marked_wherever_its_figure_is_used(whole) -> None:
    text = said(whole)
    assert "- scan fused:mamba_ssm (rival): error 3 times its budget" in text
    why = "1 outside the budget (at most 3 budgets, a relative error of 0.06)"
    assert f"| upstream (fused:mamba_ssm), rival | 0 of 1 | {why} |" in text
    rows = [line for line in text.splitlines() if line.startswith("| scan B8 L1569 E384 N16 | infer |")]
    mark = "error 3 times its budget"
    assert [row.split(" | ")[6] for row in rows] == [f"40 ({mark})", f"0.3 ({mark})", f"1 ({mark})"]
    assert rows[2].endswith(f"| **{mark}** |")
    assert "upstream: error 3 times its budget" in text and "upstream: error 2.6 times its budget" in text  # of two figures


def test_a_rivals_time_has_a_mark_only_for_more_than_a_tenth_outside_the_budget(tmp_path) -> None:
    """Values of 1e-8 where exactly 0 is due, answers that differ from call to call, and a budget missed by 1 % are no mark."""
    entry, point = Entry("conv", "fused:mamba_ssm", "rival"), Point("conv", (("B", 1), ("L", 1), ("E", 8), ("K", 4)), "train")
    zero, bits = Finding("w.grad", "zero", 1e-8, 0.0), Finding("y", "bitwise", 5.0, 0.0)
    for ratio, mode, expected in ((1.01, "train", 0.0), (1.2, "train", 1.2), (1.2, "infer", 0.0)):
        run = sweeps.made(tmp_path / f"{ratio}{mode}", [])
        bad = (zero, bits, Finding("x.grad", "max", ratio, 1.0, 10.0))
        run.add(Record("conv", "fused:mamba_ssm", "rival", "backward", "B1-bfloat16", "bfloat16", "fail", findings=bad))
        here = dataclasses.replace(point, mode=mode)
        run.speeds = [sweeps.speed(entry, here, 1.0, wrong=math.inf, reason="parity backward failed")]
        [marked] = faults.marked(run)
        assert marked.wrong == pytest.approx(expected) and bool(curves.fault_note(marked)) == bool(expected)


def test_a_rival_that_raised_is_marked_too(tmp_path) -> None:
    [family] = curves.families(_line(SDPA, (1, 2), reason="parity forward failed in X: RuntimeError: <no>"))
    assert "**not judged: parity forward failed in X: RuntimeError: &lt;no>**" in speed_tables.models(family.curves[0].timed)


def test_running_out_of_memory_is_shown(whole) -> None:
    text = said(whole)
    assert "| 1 x 128 x 224 px | 25,089 | eager | vit tiny naive (rival) | **out of memory** | - |" in text
    assert "| vit tiny naive (rival) | not tried: oom at tiny-B1-T128-S224-L25089-infer-eager-bfloat16 already |" in text
    assert "x: out of memory (ViT, attention written out)" in text
    [family] = curves.families(whole.speeds)
    ends = {c.entry.name: c.ended.point["T"] for c in family.curves if c.ended}
    assert ends == {"vit tiny naive": 128}


def test_a_thing_has_one_colour_in_all_figures_and_no_panel_more_than_five_lines(whole) -> None:
    looks = list(things.LOOKS.values())
    assert things.look("fused:native") != things.look("fused:mamba_ssm") and things.look("x") == things.look("x")
    assert things.look("reference", "vit") == things.look("naive") != things.look("reference")
    for path in whole.folder.glob("*.svg"):
        text = path.read_text()
        for look in (things.look("fused:native"), things.look("fused:mamba_ssm")):
            for label in re.findall(rf">({re.escape(look.label)})</text>", text):
                assert look.colour.lower() in text.lower(), (path, label)
    models = (whole.folder / "models-infer-tiny-B1-S224-bfloat16.svg").read_text()
    assert sum(f">{look.label.split(',')[0]}" in models for look in looks[:5]) >= 2
    [family] = curves.families(whole.speeds)
    main, rest = speed_figures.models(family, whole.folder, "allocated")
    assert [d.path.stem for d in (*main, *rest)] == [family.stem + end for end in ("", "-memory", "-tokens", "-eager")]


def test_lines_that_lie_on_each_other_are_told() -> None:
    assert figures.hidden([("a", {1: 1.0, 2: 2.0}), ("b", {1: 1.01, 2: 2.02}), ("c", {1: 1.5, 2: 3.0})]) == ["b lies on a"]


def test_what_finds_no_room_in_a_panel_is_named(tmp_path) -> None:
    names = ("cudnn", "flash", "efficient", "sdpa", "fused:torch")
    entries = [NATIVE, *(dataclasses.replace(SDPA, implementation=name) for name in names)]
    [family] = curves.families([s for i, entry in enumerate(entries) for s in _line(entry, (1 + i, 2 + i))])
    assert "in the tables alone: ours in plain PyTorch" in speed_figures.models(family, tmp_path, "allocated")[0][0].caption


def _line(entry: Entry, times, way="eager", **rest) -> list[Speed]:
    """Times of one entry at 1, 2, 4, ... times 100 tokens."""
    sizes = [(("B", 1), ("T", 2**i), ("S", 224), ("L", 100 * 2**i)) for i in range(len(times))]
    return [Speed(entry, Point("tiny", d, "infer", way), "ok", (t,) * 7, **rest) for d, t in zip(sizes, times, strict=True)]


def test_crossing_of_known_curves() -> None:
    xs = [100, 200, 400, 800, 1600]
    line, square = [x / 1000 for x in xs], [x * x / 500_000 for x in xs]  # equal at 500
    assert curves.crossing(xs, line, square) == pytest.approx(500)
    assert curves.crossing(xs, square, line) == pytest.approx(500)
    assert curves.crossing(xs, line, [x * x / 400_000 for x in xs]) == pytest.approx(400)
    assert curves.crossing(xs, [1, 1, 3, 9, 9], [2, 2, 3, 4, 5]) == 400  # exactly on a point
    assert curves.crossing(xs, line, [2 * y for y in line]) is None
    assert curves.crossing([100, 400], [1, 4], [4, 1]) == pytest.approx(200)
    assert curves.crossing(xs, [2, 0.5, 2, 2, 0.5], [1] * 5) == pytest.approx(800 * math.sqrt(2))  # the last of three
    assert curves.crossing([], [], []) is None and curves.crossing([7], [1], [2]) is None


def test_meetings_in_words() -> None:
    [family] = curves.families(_line(NATIVE, (4, 4, 4)) + _line(SDPA, (1, 4, 16)))
    assert speed_tables.meetings(family) == (
        "- **videomamba tiny fused:native** meets the fastest ViT at **200 tokens** a clip and is faster from there on (timed"
        " at 100 to 400 tokens); its time over the ViT's is 4 at the shortest and 0.25 at the longest."
    )
    [family] = curves.families(_line(NATIVE, (4, 4, 4)) + _line(SDPA, (1, 2, 3), wrong=7.0))
    text = speed_tables.meetings(family)
    assert "does not meet the fastest ViT; slower everywhere from 100 to 400 tokens" in text
    assert text.endswith("**error 7 times its budget**.")
    [family] = curves.families(_line(NATIVE, (4, 4)) + _line(SDPA, (1, 2), way="graph"))
    assert "no ViT has a time where it has one (eager)" in speed_tables.meetings(family)  # ways do not mix


def test_the_fastest_vit_is_taken_at_each_length() -> None:
    other = dataclasses.replace(SDPA, implementation="reference")
    [family] = curves.families(_line(NATIVE, (2, 2, 2)) + _line(SDPA, (1.5, 1.5, 5)) + _line(other, (1, 3, 9)))
    assert [s.entry.implementation for s in family.fastest_vit("eager").values()] == ["reference", "sdpa", "sdpa"]


def test_the_page_of_reports_gets_of_every_race_the_newest_numbers_between_its_markers(whole, tmp_path) -> None:
    page_file, place = tmp_path / "README.md", Path("accepted/h200")
    page_file.write_text(f"before\n{accepted.MARKERS[0]}\nold\n{accepted.MARKERS[1]}\nafter\n")
    conv = [s for s in sweeps.operators() if s.point.race == "conv"]
    without = [dataclasses.replace(s, seconds=(), status="gated", reason="parity") for s in whole.speeds]
    later = sweeps.made(tmp_path / "later", conv, started="3026-01-02")
    gated = sweeps.made(tmp_path / "gated", without, started="3026-01-03")
    narrow = [sweeps.made(tmp_path / w, whole.speeds, plan={w: ["*"]}, started="3026-01-04") for w in ("points", "names")]
    runs = {place / "gated": gated, place / "later": later, place / "whole": whole}
    runs |= {place / run.folder.name: run for run in narrow}
    for _ in range(2):
        accepted.write(page_file, runs)
        text = page_file.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
        assert "conv: on one NVIDIA H200, 3026-01-02 ([report](accepted/h200/later/report.md))" in text
        assert text.count("(accepted/h200/whole/report.md)") == 2 and "/gated" not in text
        assert "From [whole](accepted/h200/whole/report.md), [later](accepted/h200/later/report.md):\n\nMedians" in text
        assert "| scan, 8 x 1,569 tokens, 1,152 channels |" in text and "| convolution, 8 x" in text
        assert "3026-01-04" not in text
        assert "(accepted/h200/whole/models-infer-tiny" in text
    page_file.write_text("no place for numbers")
    accepted.write(page_file, runs)
    assert page_file.read_text() == "no place for numbers"


def test_the_overview_sets_ours_beside_the_fastest_of_either_kind() -> None:
    at = next(iter(sweeps.operators())).point
    scan = Speed(Entry("scan", "fused:native", "ours"), at, "ok", (0.5,))
    slower, upstream = (dataclasses.replace(scan, entry=Entry("scan", n, r), seconds=(t,)) for n, r, t in
                        (("fused:torch", "ours", 2.0), ("fused:mamba_ssm", "rival", 1.5)))  # fmt: skip
    line = overview.overview([slower, scan, upstream]).splitlines()[-1]
    assert line.endswith("| 500 | 1,500 (3.00x) |") and at.race in line, "no column without a number"
    wrong = dataclasses.replace(upstream, wrong=2.0)
    assert "1,500 (3.00x)* |" in (marked := overview.overview([scan, wrong])) and "`*`: the rival's error" in marked
    assert "`*`" not in overview.overview([scan, upstream])
    gated = dataclasses.replace(scan, status="gated", seconds=(), reason="parity failed")
    assert "not timed" in overview.overview([gated, upstream]) and "1,500 |" in overview.overview([gated, upstream])
    graph, eager = _line(NATIVE, (8, 2), way="graph") + _line(SDPA, (2, 8), way="graph"), _line(NATIVE, (99, 99))
    assert overview.overview([*graph, *eager]).count("99") == 0
    [said] = overview.crossings([*graph, *eager])
    assert "CUDA graphs: ours meets the ViT at **" in said and "upstream" not in said


@pytest.mark.parametrize(("without", "better"), [((1, 4), True), ((4, 9), False)])
def test_the_crossing_is_told_of_the_better_form_of_the_vit(without, better) -> None:
    """With a class token ours meets it at 283 tokens; without one at 300, or is faster at every length."""

    def tokens(entry, times):
        dims = [(("B", 1), ("L", length)) for length in (100, 400)]
        return [sweeps.speed(entry, Point("tiny", d, "infer", "graph"), t) for d, t in zip(dims, times, strict=True)]

    lines = _line(NATIVE, (4, 8, 8, 8), way="graph"), _line(SDPA, (1, 4, 16, 64), way="graph")
    both = [s for line in (*lines, tokens(NATIVE, (3, 3)), tokens(SDPA, without)) for s in line]
    with_token, alone = overview.crossings(both)
    title = "VideoMamba-Ti against ViT-Ti, inference: batch 1, tokens without a class token, bfloat16, CUDA graphs"
    assert alone.startswith(f"- {title}: ours ")
    assert alone.endswith("better form of the ViT.") is better
    assert with_token.endswith("better form of the ViT.") is not better
    assert "better form" not in "".join(overview.crossings([s for s in both if s.point.clips]))


def test_another_model_in_a_race_is_not_upstream(tmp_path) -> None:
    """Pooling is faster than a compressor, and stock layers are slower than Vamba: neither is upstream's way."""
    at = next(p for p in grids.points("full") if p.race == "bimba" and p.mode == "infer")
    ours = Speed(Entry("bimba", "fused:native", "ours"), at, "ok", (0.01,))
    upstream = dataclasses.replace(ours, entry=Entry("bimba", "fused:mamba_ssm", "rival"), seconds=(0.03,))
    pooling = dataclasses.replace(ours, entry=Entry("resamplers", "pooling", "rival"), seconds=(0.001,))
    assert overview.beside_others([ours, upstream, pooling]).endswith("| 10 | 30 (3.00x) | 1 (0.10x) |")
    said = made(tmp_path, [ours, upstream, pooling])
    assert "BIMBA's compressor is 3.0 times as fast as upstream." in said
    assert "as fast as upstream; against pooling 0.10x: BIMBA, 64 frames of" in said


def test_the_overview_says_what_inputs_were_drawn() -> None:
    races = [grids.races()[name] for name in ("mixer", "mixer-fresh", "mixer-long-memory", "mixer-worst-case")]
    mixer = Entry("mixer", "fused:native", "ours")
    usual, *variants = [sweeps.speed(mixer, race.points("full")[0], 1.0) for race in races]
    text = overview.overview([usual, *variants])
    assert "Inputs: (fresh): steps near 0.7" in text and "hundreds of tokens; (worst case): inputs of which" in text
    rows = [f"| Mamba mixer, 1 x 9,409 tokens, width 576 ({word}) | 1 |" for word in ("fresh", "long memory", "worst case")]
    assert all(row in text for row in rows)
    assert "worst case" not in overview.overview([usual, variants[0]]) and "Inputs" not in overview.overview([usual])


def test_what_keeps_its_scan_stands_beside_ours() -> None:
    kept = dataclasses.replace(NATIVE, implementation="fused:native_kept")
    point = sweeps.clip(64, mode="train")
    ours, other, vit = (sweeps.speed(e, point, t, m) for e, t, m in ((NATIVE, 2.0, 4.0), (kept, 1.5, 9.0), (SDPA, 3.0, 3.0)))
    line = overview.overview([ours, other, vit]).splitlines()[-1]
    assert line.endswith("| 2 | 1.5 (0.75x) | 3 (1.50x) |")
    failed = [dataclasses.replace(s, status=word, seconds=(), reason=word) for s, word in ((other, "oom"), (ours, "timeout"))]
    assert overview.overview([*failed, vit]).splitlines()[-1].split(" | ")[1:] == ["**out of time**: timeout", "3 |"]
    [said] = overview.most_memory([ours, other, vit])
    assert "ours 4 GiB; ours, states kept 9 GiB" in said
    lines = _line(NATIVE, (8, 2), way="graph"), _line(kept, (8, 1), way="graph"), _line(SDPA, (2, 8), way="graph")
    [said] = overview.crossings([s for line in lines for s in line])
    assert said.count("meets the ViT at **") == 2 and "ours, states kept, meets" in said


def test_the_least_memory_of_a_kind_is_named() -> None:
    point = sweeps.clip(64, mode="train")
    hungry, lean = (Entry("videomamba", f"fused:mamba_ssm{n}", "rival", variant="middle") for n in ("", "_inner"))
    steps = [sweeps.speed(hungry, point, 1.0, 11.0), sweeps.speed(lean, point, 2.0, 7.0), sweeps.speed(NATIVE, point, 1.0, 4.0)]
    [said] = overview.most_memory(steps)
    assert "ours 4 GiB; upstream, one fused mixer 7 GiB" in said and "11 GiB" not in said


def test_the_papers_comparison(whole) -> None:
    found = paper.pairs(whole.speeds)
    assert [p.mamba.point["T"] for p in found] == [8] * 4 + [32] * 4 + [64] * 4
    naive, sdpa = found[0], found[1]
    assert (naive.against, naive.vit.entry.implementation) == ("naive", "reference")
    assert (sdpa.against, sdpa.vit.entry.implementation) == ("best SDPA", "sdpa")
    L = 1569
    assert naive.throughput == pytest.approx((2 + 2.2e-6 * L * L) / (2.5 + 1.3e-3 * L))
    assert "| 64 | 1 | fused:native | naive (reference) |" in said(whole)


def test_nothing_timed_and_nothing_drawn(tmp_path) -> None:
    text = made(tmp_path)
    assert "Nothing of ours was timed." in text and "Nothing to draw." in text and "![" not in text
    assert {f.suffix for f in (tmp_path / "run").iterdir()} == {".json", ".jsonl", ".md", ".html"}


def test_a_cpu_a_filter_and_an_interruption_are_loud(tmp_path) -> None:
    plan = {"grid": "cpu", "device": "cpu", "races": ["scan"], "names": ["fused:torch"]}
    text = made(tmp_path, [], "interrupted", plan=plan, box=sweeps.BOX | {"gpu": None})
    assert text.startswith("# Bench on a CPU, grid cpu, ")
    assert "So far: the run is interrupted." in text and "> **Interrupted.**" in text
    assert "> **A part of the points** (races scan; only fused:torch). It compares those that were timed" in text
    assert "This is the CPU grid: it shows that the bench works; its numbers say nothing of a GPU." in text
    assert "- vit: **flash** (rival): no &lt;flash> here" in text
    assert "resident" in text and "allocator" not in text


def test_few_samples_are_owned_up_to() -> None:
    speed = dataclasses.replace(_line(NATIVE, (0.002,))[0], seconds=(0.002, 0.004))
    assert speed_tables.milliseconds(speed) == "3 [2, 4, n = 2]"


def alone(text: str) -> None:
    """Nothing is fetched, and links lead to places of the page itself."""
    assert not re.search(r"<(link|iframe|object|embed)\b|<script[^>]|@import|srcset=|\ssrc=", text)
    assert all(place.startswith("#") for place in re.findall(r"url\(([^)]*)", text))
    links = re.findall(r"\shref=[\"']?([^\"'>]*)", text)
    names = re.findall(r'\sid="([^"]*)"', text)
    assert all(link.startswith("#") and link[1:] in names for link in links if link), links
    assert len(names) == len(set(names)), [name for name in names if names.count(name) > 1]


def test_the_html_holds_all_and_needs_nothing(whole) -> None:
    text, markdown = (whole.folder / "report.html").read_text(), said(whole)
    alone(text)
    assert text.count("<figure>") == text.count('<svg role="img"') == markdown.count("![") == 10
    assert text.count("<h2>") == len(re.findall("^## ", markdown, re.M))
    tables = len(re.findall("^[|] ---", markdown, re.M))
    assert text.count("<table>") == text.count('<div class="scroll" tabindex="0">') == tables - 1  # the large numbers
    assert "<title>Bench on NVIDIA H200, grid full, " in text and 'name="viewport"' in text
    assert "no &lt;flash&gt; here" in text and len(text) < 3e6
    assert text.index('class="verdict"') < text.index('class="numbers"') < text.index("<figure>") < text.index("<nav")


def test_html_of_hostile_markdown(tmp_path) -> None:
    text = html(
        "# <b>\n\n<script>x</script> [away](https://example.org) `<i>` [here](#b)\n\n| a |\n| --- |\n| b \\| c |\n", tmp_path
    )
    assert "<script>" not in text and "away" in text and "example.org" not in text and '<a href="#b">' in text
    assert '<div class="scroll" tabindex="0"><table>' in text.replace("\n", "") and "b | c" in text


def test_a_page_of_one_text_has_the_frame(tmp_path) -> None:
    write_both(tmp_path, "# <t>\n\n**Said.**\n\n## One\n\ntext\n\n## Two\n\n### Three\n\n- more\n", "<t>")
    text = (tmp_path / "report.html").read_text()
    alone(text)
    assert "<title>&lt;t&gt;</title>" in text and '<section id="one">' in text and '<h3 id="three">' in text
    assert "[Two](#two)" in (tmp_path / "report.md").read_text()


def test_the_parity_page_is_html_too(tmp_path) -> None:
    run = sweeps.made(tmp_path / "run", [], plan={"grid": "smoke"})
    page.write(run)
    text = (run.folder / "report.html").read_text()
    alone(text)
    assert "<h1>Parity on NVIDIA H200, grid smoke, " in text and "1 FAILED" in text
