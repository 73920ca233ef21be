"""A thing has one colour and one marker in every figure; terms of a page link to its glossary; the page of planted bugs."""

import re
from pathlib import Path

import pytest
import test_report

from harness.bench import grids
from harness.judge.registry import subjects
from harness.records.finding import Finding
from harness.records.record import Record
from harness.report import glossary, html, mutants, things
from harness.report import parity as page


@pytest.mark.parametrize("race", grids.races())
def test_who_races_is_told_apart(race: str) -> None:
    """Whoever is timed has a look of its own, and no other in the race has its colour and marker."""
    looks = {}
    for subject, _ in grids.races()[race].contenders:
        for i in subjects()[subject].implementations():
            if i.name == "reference" and subject != "vit":
                continue
            looks[subject, i.name] = things.look(i.name, subject)
            assert (subject, i.name) in things.OWN or i.name in things.LOOKS
    told_apart = {(look.colour, look.marker) for look in looks.values()}
    shared = len(looks) - len(set(looks.values()))  # one implementation of several subjects is one thing
    assert len(told_apart) == len(looks) - shared


def test_a_term_links_to_its_entry_once_in_a_section(tmp_path: Path) -> None:
    made = test_report.made(tmp_path, [test_report.record()])
    text = page.write(made).with_suffix(".html").read_text()
    entries = re.findall(r'<li id="(term-[^"]*)"', text)
    assert len(entries) == len(glossary.TERMS) == len(set(entries))
    tight = text.partition('id="how-tight"')[2].partition("</section>")[0]
    assert tight.count('href="#term-budget"') == 1 and re.search('class="term">budgets?</a>', tight)
    assert set(re.findall(r'href="#(term-[^"]*)"', text)) <= set(entries)
    assert "#term-" not in text.partition('id="glossary"')[2], "the glossary links to itself"


def test_spellings() -> None:
    seen: set[str] = set()
    said = [part for part, where in glossary.split("Two budgets, a budget, ViTs, rivals; ours-to-be, eagerly", seen) if where]
    assert said == ["budgets", "ViTs", "rivals"] and seen == {"term-budget", "term-vit", "term-ours"}
    assert "a.term" not in html.html("a budget", Path(), None) and "href" not in html.html("a budget", Path(), None)
    assert "<h3 id=\"budget\">budget</h3>" in html.html("### budget", Path(), set())
    assert html.html("[a budget](#there)", Path(), set()).count("href") == 1


def test_the_page_of_planted_bugs(tmp_path: Path) -> None:
    """Its first screen has the score, what survived, what is known to survive, and the weakest room; no room is no error."""
    caught, lost = Finding("tests", "survived", 0.0, 0.0, note="tests/a.py::test_a"), Finding("tests", "survived", 1.0, 0.0)
    bugs = [Record("judge", "bug", "ours", "mutants", f"a.py: {i}", "", "pass", findings=(caught,)) for i in range(3)]
    bugs += [
        Record("pages", "bug", "ours", "mutants", "b.py: lost", "", "fail", findings=(lost,)),
        Record("pages", "bug", "ours", "mutants", "b.py: known", "", "skip", reason="known to survive: no test of it"),
        Record("pages", "bug", "ours", "mutants", "b.py: gpu", "", "skip", reason="needs a GPU: a kernel"),
        Record("pages", "bug", "ours", "mutants", "b.py: odd", "", "error", reason="it fails without the bug too: x"),
    ]
    text = mutants.write(test_report.made(tmp_path / "run", bugs, kind="mutants")).read_text()
    assert "The tests find 3 of 5 planted bugs. 1 survived that were thought to be found. 1 could not be judged" in text
    assert "| judge | 3 | 0 | 0 | 100 % | 0 | 0 | 0 |" in text and "| all | 3 | 1 | 1 | 60 % | 0 | 1 | 1 |" in text
    assert "in the weakest room, pages" in text and "b.py: known | no test of it" in text
    assert mutants.scores(bugs) == ["judge       100 %  3 of 3 caught", "pages         0 %  0 of 2 caught"]
    assert "No bug was planted" in mutants.write(test_report.made(tmp_path / "none", [], kind="mutants")).read_text()


def test_slow_points_of_a_race_are_not_timed_out() -> None:
    """A prefill of 28 stock layers takes some 10 s, more than the 2 s that a call may usually take."""
    assert grids.races()["vamba"].slowest >= 20
    points = grids.races()["vamba"].points("full")
    assert {grids.race_of(p).fewest(p) for p in points if p["V"] == 153_088} == {2}
    points = grids.races()["bimba"].points("full")
    timed = {e.implementation: sum(grids.runs(e, p, "full") for p in points) for e in grids.entries("bimba", "cpu", "sdpa")}
    assert timed["fused:torch"] == 0 and timed["pooling"] == timed["attention-sdpa"] == len(points) == 16
    assert timed["attention-naive"] == 10  # inference and training at two sizes of width 1024, and at up to 64 frames
