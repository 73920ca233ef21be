"""The words that pages use, explained once; wherever else a page has one, it is a link to here."""

import re
from collections.abc import Iterator

from harness.report.markdown import Markdown

TITLE = "Glossary"

TERMS = {
    "answer": "one question (a check) asked of one implementation in one case, and what came of it",
    "bfloat16, float16": "numbers of 16 bits; a rounding to them costs up to 0.4 % and 0.05 % of the number",
    "budget": "what an error may be: twice the error of the reference in the same precision, plus one rounding of the result",
    "case": "sizes, options and precision of one question; B is the batch, T frames, S pixels of a side, L tokens, D and E "
    "widths, N states",
    "check": "a question with a yes or no answer, such as whether the gradients agree",
    "CUDA graph": "a recording of all kernels of a call; its replay costs no time in Python",
    "eager": "one call of the model after another, as PyTorch runs it by default",
    "interval": "where the median would be found in 95 of 100 repetitions on the same machine: `[low, high]`",
    "kept": "our backend `native_kept`: it trains with more memory in less time",
    "median": "half of the samples are faster, half are slower",
    "naive": "attention that writes its matrix of scores to memory",
    "ours, rival": "our implementations decide the verdict; rivals (mamba-ssm, the ViT) are judged by the same rule",
    "parity": "equality with the reference within the tolerance",
    "reference": "VideoMamba in plain PyTorch, written to be read; in float64 it is the truth",
    "relative error": "the error over the norm of the truth",
    "roofline": "the least time in which this GPU could do the work, by its measured memory traffic and arithmetic",
    "token": "a patch of 16 x 16 pixels of a frame; a frame of 224 pixels has 196",
    "upstream": "the package mamba-ssm, with the kernels that the authors of Mamba published",
    "ViT": "a vision transformer of similar size, with the fastest attention that PyTorch has here",
}


def terms() -> Markdown:
    """Return the terms as a list."""
    return Markdown("\n".join(f"- **{term}**: {what}." for term, what in TERMS.items()))


def anchor(term: str) -> str:
    """Return the anchor of an entry, by its first word or words."""
    return "term-" + re.sub(r"\W+", "-", term.split(",")[0].lower())


# Every spelling and the anchor of its entry; a plural s is no other spelling.
ANCHORS = {word: anchor(term) for term in TERMS for word in term.split(", ")}
_TERM = re.compile(r"(?<![\w-])(" + "|".join(sorted(map(re.escape, ANCHORS), key=len, reverse=True)) + r")s?(?![\w-])")


def split(text: str, seen: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the parts of a text, each with the anchor of its entry or ""; terms in `seen` are text, others are added to it."""
    end = 0
    for match in _TERM.finditer(text):
        where = ANCHORS[match[1]]
        if where not in seen:
            seen.add(where)
            yield text[end : match.start()], ""
            yield match[0], where
            end = match.end()
    yield text[end:], ""
