"""The frame of every page: report.md, and report.html, which is one file that fetches nothing."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import NamedTuple

import jinja2
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from harness.report import glossary, markdown, things
from harness.report.figures import GRID, INK, PAPER

TEMPLATES = Path(__file__).parent / "templates"
LARGEST = 1.75  # pixels of a figure's point at most
LONG = 24  # characters above which a table's cell may be broken into lines
# A number, with what may stand behind it: a unit, an interval or a ratio in brackets, another number, a mark.
NUMBER = re.compile(r"[-+<]?\d[\d,.]*(e[-+]?\d+)?( ?[%x])?(( of| /) [\d,.]+)?( ?[(\[].*[)\]])?\*?$")


class Number(NamedTuple):
    """A large number of the first screen; `label` says of what it is, and beside whom."""

    value: str
    unit: str
    label: str


class Section(NamedTuple):
    """A section; `body` is Markdown. What is folded is one click away."""

    title: str
    body: str
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """A page: the first screen (a sentence, some numbers, a chart), then the sections. All text but titles is Markdown."""

    title: str
    verdict: str
    numbers: Sequence[Number] = ()
    chart: str = ""
    sections: Sequence[Section] = ()


def write(folder: Path, page: Page) -> Path:
    """Write report.md and report.html into the folder, where the pictures are; return the path of the former."""
    write_html(folder, page, "report")
    environment = _environment(folder)
    numbers = markdown.table([n.label for n in page.numbers], [[f"{n.value} {n.unit}".strip() for n in page.numbers]])
    path = folder / "report.md"
    text = environment.get_template("page.md").render(page=page, numbers=numbers)
    path.write_text(text, encoding="utf-8")
    for picture in folder.glob("*.svg"):
        if f"]({picture.name})" not in text:  # drawn for an earlier version of the page
            picture.unlink()
    return path


def write_html(folder: Path, page: Page, stem: str) -> Path:
    """Write STEM.html into the folder, where the pictures are; return its path."""
    style, script = (Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    environment = _environment(folder, explained=any(s.title == glossary.TITLE for s in page.sections))
    text = environment.get_template("page.html").render(page=page, style=style, script=script)
    path = folder / f"{stem}.html"
    path.write_text(text, encoding="utf-8")
    return path


def write_both(folder: Path, text: str, title: str) -> Path:
    """Write a page that is one text of Markdown: a title, a verdict, and sections."""
    head, *parts = re.split(r"^## ", text.partition("\n")[2], flags=re.M)
    sections = [Section(name.strip(), body.strip()) for name, _, body in (part.partition("\n") for part in parts)]
    return write(folder, Page(title, head.strip(), sections=sections))


def _environment(folder: Path, explained: bool = False) -> jinja2.Environment:
    """Return the templates, which read pictures from a folder; in a page that is `explained` terms link to its glossary."""

    def as_html(text: str, title: str = "") -> Markup:
        return Markup(html(text, folder, None if not explained else set(), title == glossary.TITLE))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=jinja2.select_autoescape(["html"]), keep_trailing_newline=True
    )
    environment.filters |= {"slug": slug, "md": markdown.escape, "html": as_html}
    return environment


def slug(title: str) -> str:
    """Return the anchor of a title, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def html(text: str, folder: Path, seen: set[str] | None = None, entries: bool = False) -> str:
    """Return Markdown as HTML. Pictures are read from the folder; of links only those within the page stay links.

    The first of each term of the glossary that is not in `seen` becomes a link, unless that is None. With `entries` the text is
    the glossary itself, whose items get the anchors.
    """
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = list(_adapted(reader.parse(text), folder))
    if entries:
        for i, token in enumerate(tokens):
            if token.type == "inline" and tokens[i - 2].type == "list_item_open":
                tokens[i - 2].attrSet("id", glossary.anchor((token.children or [])[2].content))
    elif seen is not None:
        for i, token in enumerate(tokens):
            if token.type == "inline" and tokens[i - 1].type not in ("heading_open", "th_open"):
                token.children = list(_with_terms(token.children or [], seen))
    return str(reader.renderer.render(tokens, reader.options, {}))


def _adapted(tokens: Sequence[Token], folder: Path) -> Iterator[Token]:
    """Yield the tokens with tables in boxes that scroll by themselves, pictures inside, and anchors at headings."""
    pictures, seen = False, Counter[str]()
    numeric, column = set[int](), 0
    for i, token in enumerate(tokens):
        if token.type in ("paragraph_open", "inline", "paragraph_close"):
            inline = tokens[i + {"paragraph_open": 1, "inline": 0, "paragraph_close": -1}[token.type]]
            if _is_picture(inline):
                if token.type == "inline":
                    opened = "" if pictures else '<div class="figures">\n'
                    pictures = True
                    closed = "" if _is_picture_at(tokens, i + 2) else "</div>\n"
                    pictures = not closed
                    yield Token("html_block", "", 0, content=opened + _figure(inline, folder) + closed)
                continue
        if token.type == "inline":
            token.children = list(_links_within(token.children or [], folder))
        elif token.type == "heading_open":
            name = slug(unescape(tokens[i + 1].content))
            seen[name] += 1
            token.attrSet("id", name + f"-{seen[name] - 1}" * (seen[name] > 1))
        elif token.type in ("th_open", "td_open"):
            if column in numeric:
                token.attrJoin("class", "number")
            if token.type == "td_open" and sum(len(c.content) for c in tokens[i + 1].children or []) > LONG:
                token.attrJoin("class", "long")
            column += 1
        elif token.type == "tr_open":
            column = 0
        if token.type == "table_open":
            numeric = _numeric_columns(tokens[i:])
            yield Token("scroll_open", "div", 1, attrs={"class": "scroll", "tabindex": "0"}, block=True)
        yield token
        if token.type == "table_close":
            yield Token("scroll_close", "div", -1, block=True)


def _numeric_columns(tokens: Sequence[Token]) -> set[int]:
    """Return the columns of the table with which the tokens begin in most of whose filled cells a number stands."""
    cells: dict[int, list[bool]] = {}
    column = 0
    for token, after in itertools.pairwise(tokens):
        if token.type == "table_close":
            break
        column = 0 if token.type == "tr_open" else column + (token.type == "td_close")
        if token.type == "td_open" and after.content not in ("", "-"):
            cells.setdefault(column, []).append(bool(NUMBER.match(after.content.replace("\\", "").strip("*"))))
    return {column for column, numbers in cells.items() if sum(numbers) > len(numbers) / 2}


def _links_within(children: Sequence[Token], folder: Path) -> Iterator[Token]:
    """Yield a paragraph's tokens; links are plain text, but those within the page and to other pages below its folder."""
    inside = False
    for child in children:
        if child.type == "link_open":
            link = str(child.attrs.get("href", ""))
            inside = link.startswith("#") or (link.endswith(".html") and ":" not in link and (folder / link).is_file())
        if child.type not in ("link_open", "link_close") or inside:
            yield child


def _with_terms(children: Sequence[Token], seen: set[str]) -> Iterator[Token]:
    """Yield a paragraph's tokens; terms that are not in `seen` are links to the glossary."""
    depth = 0
    for child in children:
        depth += {"link_open": 1, "link_close": -1}.get(child.type, 0)
        if child.type != "text" or depth:
            yield child
            continue
        for part, where in glossary.split(child.content, seen):
            word = Token("text", "", 0, content=part)
            link = Token("link_open", "a", 1, attrs={"href": f"#{where}", "class": "term"}), Token("link_close", "a", -1)
            yield from (link[0], word, link[1]) if where else (word,)


def _is_picture(token: Token) -> bool:
    """Return whether a token is a picture alone."""
    return [c.type for c in token.children or []] == ["image"]


def _is_picture_at(tokens: Sequence[Token], i: int) -> bool:
    """Return whether the paragraph that opens at an index is a picture alone."""
    return i + 1 < len(tokens) and tokens[i].type == "paragraph_open" and _is_picture(tokens[i + 1])


def _figure(inline: Token, folder: Path) -> str:
    """Return a picture's SVG as an element with its caption; its colours follow the page, its names are its own."""
    [image] = inline.children or []
    path = folder / str(image.attrs["src"])
    text = re.sub(r"<metadata>.*?</metadata>|<\?xml.*?\?>|<!DOCTYPE.*?>", "", path.read_text(encoding="utf-8"), flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1)
    text = re.sub(r'\bid="|url\(#|<use xlink:href="#', lambda m: m[0] + slug(path.stem) + "-", text)
    text = text.replace(' target="_blank"', "")  # matplotlib's links would open another tab
    ours, kept = (things.LOOKS[name].colour for name in ("fused:native", "fused:native_kept"))
    for colour, name in ((INK, "ink"), (PAPER, "paper"), (GRID, "grid"), (ours, "ours"), (kept, "kept")):
        text = text.replace(colour.lower(), f"var(--{name})")
    caption = Markup("<figcaption>{}</figcaption>").format(image.content)
    width = re.search(r'viewBox="0 0 ([\d.]+)', text)
    label = Markup('<svg role="img" aria-label="{}" style="max-width: {:.0f}px"').format(
        image.content, LARGEST * float(width[1] if width else 350)
    )
    return f"<figure>\n{text.strip().replace('<svg', label, 1)}\n{caption}\n</figure>\n"
