"""A report as one HTML file that needs no other: plots are inside it, nothing is fetched."""

import base64
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

KINDS = {".svg": "image/svg+xml", ".png": "image/png"}
CSS = """\
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ccc; font-size: 1.3rem; }
h3 { margin-top: 1.6rem; font-size: 1.1rem; }
h1, h2, h3, p, li { max-width: 72ch; overflow-wrap: break-word; }
blockquote { margin: 1rem 0; padding: .1rem 1rem; border-left: .4rem solid #d55e00; background: #fff4ec; max-width: 72ch; }
code { font: .875em/1.4 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre, .scroll { overflow-x: auto; } pre { padding: .6rem .8rem; background: #f4f4f4; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border: 1px solid #ccc; text-align: left; vertical-align: top; }
th { background: #f4f4f4; } td { white-space: nowrap; } td.long { min-width: 18rem; white-space: normal; }
.scroll.picture img { max-width: 100%; height: auto; }
@media (max-width: 40rem) { .scroll.picture img { width: 48rem; max-width: none; } }"""
LONG = 60  # characters above which a table's cell is broken into lines


def html(markdown: str, folder: Path, title: str) -> str:
    """Return the page.

    Pictures are read from the folder, as vectors where an SVG of the same name stands there. Links lead nowhere outside the
    page, so they become plain text.
    """
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = list(_adapted(reader.parse(markdown), folder))
    body = reader.renderer.render(tokens, reader.options, {})
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{CSS}\n</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def write_both(folder: Path, markdown: str, title: str) -> Path:
    """Write report.md and report.html into the folder; return the path of the former."""
    path = folder / "report.md"
    path.write_text(markdown, encoding="utf-8")
    (folder / "report.html").write_text(html(markdown, folder, title), encoding="utf-8")
    return path


def _adapted(tokens: Sequence[Token], folder: Path) -> Iterator[Token]:
    """Yield the tokens with wide things in boxes that scroll by themselves, pictures inside and links undone."""
    for i, token in enumerate(tokens):
        if token.type == "inline":
            token.children = [c for c in token.children or [] if c.type not in ("link_open", "link_close")]
            for child in token.children:
                if child.type == "image":
                    child.attrs["src"] = _inside(folder / str(child.attrs["src"]))
        elif token.type == "td_open" and len(tokens[i + 1].content) > LONG:
            token.attrJoin("class", "long")
        elif token.type == "paragraph_open" and _is_picture(tokens[i + 1]):
            token.tag, token.attrs = "div", {"class": "scroll picture"}
        elif token.type == "paragraph_close" and _is_picture(tokens[i - 1]):
            token.tag = "div"
        if token.type == "table_open":
            yield Token("scroll_open", "div", 1, attrs={"class": "scroll"}, block=True)
        yield token
        if token.type == "table_close":
            yield Token("scroll_close", "div", -1, block=True)


def _is_picture(token: Token) -> bool:
    """Return whether a token is a picture alone."""
    return [c.type for c in token.children or []] == ["image"]


def _inside(path: Path) -> str:
    """Return the picture as a data URI."""
    vectors = path.with_suffix(".svg")
    path = vectors if vectors.exists() else path
    return f"data:{KINDS[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
