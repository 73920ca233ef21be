"""The pages in a browser, as `nox -s pages` runs it: on a screen and on a phone, light and dark. Without a browser it fails."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import sweeps
import test_report
from playwright.sync_api import Browser, Page, sync_playwright

from harness.records.finding import Finding
from harness.records.record import Record
from harness.report import bench, front, learning, mutants, sanitizer, side_by_side
from harness.report import parity as page

KINDS = ("parity", "bench", "operators", "streams", "learn", "mutants", "sanitize", "sides", "parities", "front")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert path, f"none of {', '.join(BROWSERS)} is installed; on Debian: apt-get install chromium"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of every kind, by kind."""
    folder = tmp_path_factory.mktemp("pages")
    bad = Finding("y", "max", 3.0, 1.0, 10.0, (0, 5))
    answers = [test_report.record(case=f"B1-L{n}-E4-N2-{d}") for n in (5, 63) for d in ("float32", "bfloat16")]
    answers += [test_report.record("fail", "backward", "a_rival", role="rival", findings=(bad,), command=test_report.COMMAND)]
    learnt = Finding("held out", "wrong", 3.0, 9.0, 30.0, note="bar 70 %")
    curve = [Finding(f"step {n}", what, 20.0 / n, 99.0, 30.0) for n in (1, 5, 9) for what in ("loss", "wrong")]
    tasks = [
        Record(task, "fused:torch", "ours", "learn", "steps9", "float32", "pass", findings=(*curve, learnt))
        for task in ("digits", "motion", "arrow")
    ]
    tiny = [s for s in sweeps.models() if s.point.race == "tiny"]
    accepted = folder / "reports" / "accepted" / "h200"
    made = {
        "parity": test_report.made(folder / "parity", answers),
        "bench": sweeps.made(accepted / "20990101-bench", [*tiny, *sweeps.operators()]),
        "streams": sweeps.made(folder / "streams", sweeps.pieces()),
        "learn": test_report.made(folder / "learn", tasks, plan={"tasks": ["digits"]}),
        "operators": sweeps.made(folder / "operators", sweeps.operators()),
    }
    clean, races = (Finding("kernels", "errors", n, 0.0, note="2 cases") for n in (0.0, 3.0))
    native = "fused:native", "ours"
    watched = [Record("scan", *native, tool, "small", "", "pass", findings=(clean,)) for tool in ("memcheck", "racecheck")]
    watched += [Record("norm", *native, "racecheck", "small", "", "fail", findings=(races,), command="again")]
    watched += [Record("norm", *native, "memcheck", "small", "", "error", reason="no end", command="again")]
    made["sanitize"] = test_report.made(folder / "sanitize", watched, kind="sanitize", plan={})
    other = [test_report.record(case=f"B1-L{n}-E4-N2-float32", findings=(Finding("y", "l2", 0.01 * n, 1.0),)) for n in (5, 63)]
    other_run = test_report.made(folder / "other", other)
    found_bug, lost = Finding("tests", "survived", 0.0, 0.0, note="tests/a.py::test_a"), Finding("tests", "survived", 1.0, 0.0)
    bugs = [Record("judge", "bug", "ours", "mutants", f"a.py: {i}", "", "pass", findings=(found_bug,)) for i in range(9)]
    bugs += [Record("pages", "bug", "ours", "mutants", "b.py: lost", "", "fail", findings=(lost,))]
    bugs += [Record("pages", "bug", "ours", "mutants", "b.py: known", "", "skip", reason="known to survive: no test of it")]
    made["mutants"] = test_report.made(folder / "mutants", bugs, kind="mutants", plan={})
    writers = {"parity": page, "learn": learning, "mutants": mutants, "sanitize": sanitizer}
    found = {kind: writers.get(kind, bench).write(run).with_suffix(".html") for kind, run in made.items()}
    found["sides"] = side_by_side.write(made["bench"], made["bench"], folder / "sides").with_suffix(".html")
    found["parities"] = side_by_side.write(made["parity"], other_run, folder / "parities").with_suffix(".html")
    return found | {"front": front.write(folder / "reports")}


@pytest.fixture(params=[(1400, "light"), (390, "dark")], ids=["screen", "phone"])
def tab(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Page]:
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = context.new_page()
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    yield opened
    context.close()
    assert not said


@pytest.mark.parametrize("kind", KINDS)
def test_a_page(kind: str, tab: Page, pages: dict[str, Path]) -> None:
    """Nothing is cut, the first chart is in sight, and every anchor leads somewhere."""
    assert tab.viewport_size
    tab.goto(pages[kind].as_uri())
    assert tab.evaluate("document.querySelector('figure').getBoundingClientRect().top") < 900
    assert 3 <= tab.locator("dl.numbers > div").count() <= 5
    first_screen = "[...document.querySelectorAll('.numbers > div, header figure')]"
    tops = tab.evaluate(first_screen + ".map(e => e.getBoundingClientRect().top)")
    beside = tab.evaluate("getComputedStyle(document.querySelector('header')).display") == "grid"
    assert beside == (tab.viewport_size["width"] > 1000) and (not beside or max(tops) < 450), "numbers beside the chart"
    for opened in (False, True):
        if opened:
            tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert tab.evaluate("document.documentElement.scrollWidth") <= tab.viewport_size["width"]
    anchors = "[...document.querySelectorAll('a')].map(a => a.getAttribute('href') || a.getAttribute('xlink:href'))"
    names = tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert not [a for a in tab.evaluate(anchors) if a.startswith("#") and a[1:] not in names]
    background, ink = (tab.evaluate(f"getComputedStyle(document.body).{what}") for what in ("backgroundColor", "color"))
    assert background != ink
    fills = tab.evaluate("[...document.querySelectorAll('figure svg text')].map(t => getComputedStyle(t).fill)")
    assert background not in fills, "text of a figure has the colour of the page"


@pytest.mark.parametrize("kind", ["bench", "parity"])
def test_what_a_table_hides_is_said_and_its_first_column_stays(kind: str, tab: Page, pages: dict[str, Path]) -> None:
    tab.goto(pages[kind].as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    tab.wait_for_timeout(100)
    wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)"
    said = tab.evaluate(wide + ".map(e => getComputedStyle(e, '::before').content)")
    assert all("goes on to the right" in text for text in said)
    if tab.viewport_size and tab.viewport_size["width"] < 1000:
        moved = "(e.scrollLeft = 200, e.querySelector('td').getBoundingClientRect().left - e.getBoundingClientRect().left)"
        assert said and max(tab.evaluate(f"{wide}.map(e => {moved})")) < 10
    heads = "[...document.querySelectorAll('th.number')].every(e => getComputedStyle(e).textAlign == 'right')"
    assert tab.locator("th.number").count() and tab.evaluate(heads)


def test_a_cell_of_the_map_opens_its_worst_cases(tab: Page, pages: dict[str, Path]) -> None:
    tab.goto(pages["parity"].as_uri())
    place = tab.locator("#backward-a_rival")
    assert not place.is_visible()
    tab.locator("svg a").filter(has_text="0/1").click()
    place.wait_for(state="visible", timeout=5000)
    assert place.evaluate("heading => heading.getBoundingClientRect().top") < 900


def test_a_term_opens_its_explanation(tab: Page, pages: dict[str, Path]) -> None:
    tab.goto(pages["parity"].as_uri())
    entry = tab.locator("#term-budget")
    assert not entry.is_visible()
    tab.locator("a.term[href='#term-budget']").first.click()
    entry.wait_for(state="visible", timeout=5000)
    assert "twice the error of the reference" in entry.inner_text()


def test_a_click_sorts_a_table_by_numbers(tab: Page, pages: dict[str, Path]) -> None:
    tab.goto(pages["bench"].as_uri())
    cells = "[...document.querySelectorAll('#how-fast tbody tr')].map(row => row.cells[1].textContent)"
    head = tab.locator("#how-fast th").nth(1)
    for order in (1, -1):
        head.click()
        texts = [text.replace(",", "") for text in tab.evaluate(cells)]
        values = [float(text) for text in texts if text.replace(".", "").isdigit()]
        assert len(values) > 5 and values == sorted(values, reverse=order < 0)
