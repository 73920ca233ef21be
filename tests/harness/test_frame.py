"""The frame of every page: columns of numbers, figures of earlier versions, legends and labels that find room."""

import re
from pathlib import Path

import pytest

from harness.report import figures, html, things
from harness.report.figures import chart, legend
from harness.report.html import Page
from harness.report.html import html as to_html
from harness.report.markdown import Markdown, sparse, table


@pytest.mark.parametrize(
    ("cells", "numeric"),
    [
        (["0.541 (3.05x)", "18.3 (1.12x)*", "-"], True),
        (["859 [773, 1,500]", "**out of memory**", "3 [2, 4, n = 2]"], True),
        (["3 of 4", "1.042 / 3.239", "98.3 % of 360", "<0.01", "1e-8"], True),
        (["2026-11-30", "2026-11-29"], False),
        (["(296, 0)", "20261130-models", "3 errors in 2 s"], False),
        (["**out of memory**", "-", "1"], False),
        (["-", ""], False),
    ],
)
def test_a_column_of_numbers_is_aligned_with_its_head(cells: list[str], numeric: bool, tmp_path: Path) -> None:
    text = to_html(table(["what", "value"], [["a name", cell] for cell in cells]), tmp_path)
    assert ('<th class="number">value' in text) == numeric and '<th class="number">what' not in text
    assert len(re.findall(r'<td class="number', text)) == len(cells) * numeric


def test_a_cell_is_as_long_as_what_is_read_of_it(tmp_path: Path) -> None:
    link, words = Markdown(f"[a](#{'b' * 60})"), "c" * 60
    text = to_html(table(["x", "y"], [[link, words]]), tmp_path)
    assert '<td><a href="#' in text and '<td class="long">ccc' in text


def test_empty_columns_are_left_out() -> None:
    assert sparse(["a", "b", "c"], [["x", "-", ""], ["-", "", ""]]) == table(["a"], [["x"], ["-"]])


def test_a_figure_that_a_page_no_longer_shows_is_gone(tmp_path: Path) -> None:
    with chart(tmp_path, "new") as axes:
        axes.plot([1, 2])
    for name in ("old.svg", "records.jsonl"):
        (tmp_path / name).write_text("x")
    html.write(tmp_path, Page("t", "said", chart="![c](new.svg)"))
    assert {p.name for p in tmp_path.iterdir()} == {"new.svg", "records.jsonl", "report.md", "report.html"}


def test_lines_nearer_than_they_are_thick_are_told() -> None:
    """A gap of 4 % is seen where the axis holds a factor of 2, and not where it holds a factor of 1,000."""
    near = ("a", {1: 1.0, 2: 2.0}), ("b", {1: 1.04, 2: 2.08})
    assert figures.hidden(near) == []
    assert figures.hidden([*near, ("c", {1: 1.0, 2: 1000.0})]) == ["b lies on a"]


SHORT, LONG = ["ours", "upstream", "ViT, cuDNN attention"], ["a long name of a thing " * 2] * 3


@pytest.mark.parametrize(("labels", "columns"), [(SHORT, 3), (LONG, 1)])
def test_a_legend_has_as_many_columns_as_there_is_room_for(labels: list[str], columns: int, tmp_path: Path) -> None:
    looks = [things.Look(f"{label}{i}", "#000000", "o") for i, label in enumerate(labels)]
    with chart(tmp_path, "a") as axes:
        axes.plot([1, 2])
        legend(axes, looks, columns=3)
        [drawn] = axes.figure.legends
    assert drawn._ncols == columns
    view = [float(x) for x in re.search(r'viewBox="([^"]*)"', (tmp_path / "a.svg").read_text())[1].split()]
    box = drawn.get_window_extent().transformed(axes.figure.dpi_scale_trans.inverted())
    assert box.x0 >= 0 and 72 * box.x1 <= view[2], "no name is cut"


def test_ours_and_its_kept_states_have_colours_of_the_page(tmp_path: Path) -> None:
    """Two that are told apart, on light and on dark."""
    with chart(tmp_path, "a") as axes:
        for name in ("fused:native", "fused:native_kept"):
            axes.plot([1, 2], **figures.line_look(things.look(name)))
    text = to_html("![c](a.svg)", tmp_path)
    style = (html.TEMPLATES / "page.css").read_text()
    for name in ("ours", "kept"):
        assert f"var(--{name})" in text and len(set(re.findall(rf"--{name}: (#\w+)", style))) == 2
    for ours, kept in zip(*(re.findall(rf"--{name}: #(\w+)", style) for name in ("ours", "kept")), strict=True):
        light = [sum(int(colour[i : i + 2], 16) for i in (0, 2, 4)) for colour in (ours, kept)]
        assert abs(light[0] - light[1]) > 100
