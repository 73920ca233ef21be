"""Turns of a conversation as text and as tokens, by the tokenizer's chat template.

A tokenizer without a template gets that of Qwen2, which both Vamba and BIMBA were trained with:

    <|im_start|>ROLE\\nTEXT<|im_end|>\\n      a turn; a system turn stands in front
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fused.models.conversation.tokenizer import END
from fused.models.vamba.loss import IGNORED

ROLES = ("system", "user", "assistant")
SYSTEM = "You are a helpful assistant."


class Turn(NamedTuple):
    """The text of one role."""

    role: str  # one of ROLES
    text: str


class Piece(NamedTuple):
    """A part of a conversation's text that is turned into tokens by itself."""

    text: str
    learnt: bool  # whether it is an answer


def chat_text(tokenizer: Any, turns: Sequence[Turn], answer_follows: bool = False) -> str:
    """Return the text of turns; with `answer_follows` it ends with the beginning of an assistant's turn."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_follows)
    if turns and turns[0].role != "system":
        turns = [Turn("system", SYSTEM), *turns]
    text = "".join(f"<|im_start|>{role}\n{text}{END}\n" for role, text in turns)
    return f"{text}<|im_start|>assistant\n" if answer_follows else text


def pieces_of(tokenizer: Any, turns: Sequence[Turn]) -> list[Piece]:
    """Return the pieces of a conversation: prompts, and answers with the token that ends them.

    A prompt is what `chat_text` gives before the answer, so that a training reads what a question to the model reads. Raises
    ValueError for a chat template that changes earlier turns when a later one follows.
    """
    pieces, done = [], ""
    for i, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        prompt, whole = chat_text(tokenizer, turns[:i], answer_follows=True), chat_text(tokenizer, turns[: i + 1])
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise ValueError("the tokenizer's chat template changes earlier turns when a later one follows; allowed: one that "
                             "only adds text")  # fmt: skip
        answer, end, rest = whole[len(prompt) :].partition(END)
        pieces += [Piece(prompt[len(done) :], False), Piece(answer + end, True), Piece(rest, False)]
        done = whole
    return [piece for piece in pieces if piece.text]


def tokenize(tokenizer: Any, pieces: Sequence[Piece], video: tuple[str, int] | None = None) -> tuple[list[int], list[int]]:
    """Return the tokens of pieces, and their labels: the token itself in answers, else -100.

    `video` is a word and the number that stands for it among the tokens in its place.
    """
    tokens: list[int] = []
    labels: list[int] = []
    for text, learnt in pieces:
        parts = [text] if video is None or learnt else text.split(video[0])
        for i, part in enumerate(parts):
            found = [video[1]] if i and video is not None else []
            found += tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
            tokens += found
            labels += found if learnt else [IGNORED] * len(found)
    return tokens, labels
