"""Names, patterns and errors are shown letter by letter in both pages, whatever Markdown would make of them."""

import re
from html import unescape
from pathlib import Path

import pytest
import sweeps
import test_report
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from harness.records.finding import Finding
from harness.records.record import Record
from harness.records.speed import Entry, Point, Speed
from harness.report import bench, learning
from harness.report import parity as page
from harness.report.markdown import bold, code, escape, fence, table

READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
SIGNS = st.text(st.sampled_from("*_`[]()<>|\\&;~$!:#\"' ab1\n\t-+"), max_size=24)
KNOWN = [
    "fused:native*", "*a* **b**", "_a_ __b__ c_d", "a|b\\|c", "<b>x</b> <http://x>", "`x` ``y` z", "[a](http://x) ![p](x)",
    "[a]: b", "&lt; &amp;", "C:\\temp\\*", "~~gone~~", "$x$", "two\nlines", "B[12]-T*-S[61]*-D192",
]  # fmt: skip


def shown(markdown: str) -> str:
    """The text that a reader sees, without tags."""
    return unescape(re.sub(r"<[^>]*>", "", READER.render(markdown))).strip()


def one_line(text: str) -> str:
    return " ".join(text.split())


def examples(test):
    for text in KNOWN:
        test = example(text)(test)
    return test


@examples
@given(SIGNS)
@settings(max_examples=200, deadline=None)
def test_any_text_comes_out_as_it_went_in(text: str) -> None:
    line = one_line(text)
    html = READER.render(f"x {escape(text)} y")
    assert not re.search(r"<(?!/?p>)", html), html
    assert one_line(shown(f"x {escape(text)} y")) == one_line(f"x {line} y")
    assert one_line(shown(table(["h"], [[f"x {text} y"]])).removeprefix("h")) == one_line(f"x {line} y")
    assert READER.render(table(["h", "i"], [[text, "z"]])).count("<td>") == 2
    if line:
        assert one_line(shown(f"x {code(text)} y")) == one_line(f"x {line} y")
    assert shown(fence(f"a{text}b")) == f"a{text}b"


def test_markdown_is_not_escaped_twice_and_is_cut_before_it_is_escaped() -> None:
    assert escape(escape("a*")) == escape("a*") == "a\\*" and bold("a*b") == "**a\\*b**"
    assert escape("ab*cd", 3) == "ab\\*" and "| **a\\*** | b |" in table(["x", "y"], [[bold("a*"), "b"]])
    assert escape("fused:mamba_ssm_inner y[3:5]") == "fused:mamba_ssm_inner y[3:5]"  # readable where nothing can be taken


HOSTILE = "x*_y*_`z`[a](b)|<i>"


def text_of(html: str) -> str:
    body = html.partition("<body>")[2]
    return unescape(re.sub(r"<[^>]*>", "", re.sub(r"<svg.*?</svg>|<img[^>]*>", "", body, flags=re.S)))


PLACES = ["implementation", "tensor", "note", "reason", "skip", "filter", "mutant", "video", "command"]


@pytest.mark.parametrize("where", PLACES)
def test_the_page_of_parity_shows_it(where: str, tmp_path: Path) -> None:
    plan, about = {}, {"filtered": where == "filter", "command": HOSTILE if where == "command" else "again"}
    finding = Finding(HOSTILE if where == "tensor" else "y", "l2", 2.0, 1.0, note=HOSTILE if where == "note" else "")
    records = [test_report.record("fail", name=HOSTILE if where == "implementation" else "mine", findings=(finding,))]
    records += [test_report.record("error", "backward", reason=HOSTILE)] * (where == "reason")
    records += [test_report.record("skip", "chunks", reason=HOSTILE)] * (where == "skip")
    records += [test_report.record(case="B1-video-float32")] * (where == "video")
    plan |= {"names": [HOSTILE], "cases": ["fused:native*", "*-L7-*"]} if where == "filter" else {}
    plan |= {where: HOSTILE} if where in ("mutant", "video") else {}
    run = test_report.made(tmp_path, records, plan=plan, **about)
    page.write(run)
    html = (run.folder / "report.html").read_text()
    assert HOSTILE in text_of(html)
    assert "<i>" not in html and "<em>" not in html and 'href="b"' not in html
    if where == "filter":
        assert "implementations x*_y" in text_of(html) and "cases fused:native*, *-L7-*" in text_of(html)


@pytest.mark.parametrize("where", ["entry", "reason", "absent", "points"])
def test_the_page_of_bench_shows_it(where: str, tmp_path: Path) -> None:
    entry = Entry("norm", HOSTILE if where == "entry" else "mine", "ours")
    points = [Point("norm", (("B", 1), ("L", n), ("D", 8)), "infer") for n in (1, 2, 3)]
    why = HOSTILE if where == "reason" else "why"
    speeds = [sweeps.speed(entry, points[0], 1.0, bound=5e-4)]
    speeds += [Speed(entry, p, status, reason=why) for p, status in zip(points[1:], ("gated", "implied"), strict=True)]
    absent = [{"subject": "vit", "implementation": HOSTILE, "role": "rival", "reason": HOSTILE}] if where == "absent" else []
    plan = {"points": [HOSTILE]} if where == "points" else {}
    run = sweeps.made(tmp_path / "run", speeds, plan=plan, absent=absent)
    bench.write(run)
    html = (run.folder / "report.html").read_text()
    assert HOSTILE in text_of(html)
    assert "<i>" not in html and "<em>" not in html and 'href="b"' not in html


def test_dollars_in_an_error_do_not_end_the_drawing(tmp_path: Path) -> None:
    """matplotlib would read mathematics, and raise where there is none."""
    entry, point = Entry("norm", "rival$\\x$", "rival"), Point("norm", (("B", 1), ("L", 1), ("D", 8)), "infer")
    run = sweeps.made(tmp_path / "run", [sweeps.speed(entry, point, 1.0, bound=5e-4, reason="no $\\such{$ thing")])
    bench.write(run)
    assert "rival$\\x$" in (run.folder / "roofline-infer.svg").read_text()


def test_the_page_of_learn_shows_it(tmp_path: Path) -> None:
    run = test_report.made(tmp_path, [Record("digits", HOSTILE, "ours", "learn", "steps1", "float32", "error", reason=HOSTILE)])
    learning.write(run)
    html = (run.folder / "report.html").read_text()
    assert text_of(html).count(HOSTILE) >= 3 and "<i>" not in html and "<em>" not in html
