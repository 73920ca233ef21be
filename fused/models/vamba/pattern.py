"""Which tokens an attention joins: spans of rows that are computed one by one without a mask, or a mask."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fused.rules import is_integer

Lengths = Sequence[Sequence[int]]


class Span(NamedTuple):
    """Queries of a row that read a range of its keys."""

    row: int
    queries: slice
    keys: slice


class Pattern(NamedTuple):
    """Who reads what: with neither spans nor a mask, every query every key. Queries in no span, and masked from all, get 0.

    `causal` holds within each span, and without spans, among as many queries as keys. `mask` is (B, 1, 1 or L, M), True where a
    query reads, or what is added to the scores.
    """

    causal: bool = False
    spans: tuple[Span, ...] | None = None
    mask: Tensor | None = None


def default_positions(valid: Bool[Tensor, "B L"], before: Int[Tensor, " B"]) -> Int[Tensor, "3 B L"]:
    """Return the number of valid tokens before each token, on from `before`, on every axis; 1 at padding, as upstream."""
    counted = valid.cumsum(1) - 1 + before[:, None]
    return torch.where(valid, counted, 1).expand(3, -1, -1)


def read_attention_mask(
    given: Tensor | None, tokens: Tensor, cached: Bool[Tensor, "B P"] | None
) -> tuple[Bool[Tensor, "B M"] | None, Bool[Tensor, "B 1 L M"] | None]:
    """Return which of the M = P + L keys are no padding (None: all), and which each token reads if `given` says so itself.

    `tokens` is (B, L, ...). Raises TypeError for a mask of another dtype than bool or integers, ValueError for other shapes
    or devices.
    """
    (B, L), P = tokens.shape[:2], 0 if cached is None else cached.shape[1]
    new = None if cached is None else torch.cat((cached, cached.new_ones(B, L)), dim=1)
    if given is None:
        return new, None
    if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex():
        found = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"attention_mask is {found}; allowed: a tensor of bool, or of integers 0 and 1")
    allowed = (B, P + L), (B, 1, L, P + L)
    if tuple(given.shape) not in allowed:
        raise ValueError(
            f"attention_mask has shape {tuple(given.shape)}; allowed: {allowed[0]} or {allowed[1]}, cached tokens first"
        )
    if given.device != tokens.device:
        raise ValueError(f"attention_mask is on {given.device}; allowed: {tokens.device}, where the tokens are")
    return (given.bool(), None) if given.dim() == 2 else (new, given.bool())


def text_spans(position_ids: Int[Tensor, "3 B L"], valid: Bool[Tensor, "B L"] | None) -> list[list[slice]]:
    """Return the tokens of each sample of each row, on the host; padding before the first and behind the last is left out.

    A token whose positions are 0 on all three axes begins a sample.
    """
    B, L = position_ids.shape[1:]
    begins = (position_ids == 0).all(0)
    counted = begins if valid is None else torch.stack((begins & valid, valid))
    host = counted.cpu()
    rows = []
    for row in range(B):
        if valid is None:
            starts, first, end = host[row].nonzero().flatten().tolist(), 0, L
        else:
            places = host[1, row].nonzero().flatten().tolist()
            first, end = (places[0], places[-1] + 1) if places else (0, 0)
            starts = host[0, row].nonzero().flatten().tolist()
        starts = sorted({first, *starts}) if end else []  # none in a row that is all padding
        rows.append([slice(a, b) for a, b in zip(starts, [*starts[1:], end], strict=False)])
    return rows


def causal_pattern(samples: list[list[slice]], length: int, valid: Bool[Tensor, "B L"] | None) -> Pattern:
    """Return the pattern of text that reads itself: each token those of its sample up to itself, but no padding."""
    if all(row == [slice(0, length)] for row in samples) and (valid is None or bool(valid.all())):
        return Pattern(causal=True)
    on_host = None if valid is None else valid.cpu()
    if on_host is None or all(bool(on_host[i, s].all()) for i, row in enumerate(samples) for s in row):
        return Pattern(True, tuple(Span(i, s, s) for i, row in enumerate(samples) for s in row))
    assert valid is not None  # there is padding within a sample
    number = torch.full_like(valid, -1, dtype=torch.long)
    for i, row in enumerate(samples):
        for j, s in enumerate(row):
            number[i, s] = j
    earlier = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    return Pattern(mask=(earlier & (number[:, :, None] == number[:, None]) & valid[:, None])[:, None])


def continued_pattern(length: int, total: int, valid: Bool[Tensor, "B M"] | None, device: torch.device) -> Pattern:
    """Return the pattern of `length` tokens that go on from a cache: they read it, themselves, and no padding."""
    if valid is not None and bool(valid.all()):
        valid = None
    if length == 1:
        return Pattern(mask=None if valid is None else valid[:, None, None])
    earlier = torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)[None, None]
    return Pattern(mask=earlier if valid is None else earlier & valid[:, None, None])


def cross_pattern(samples: list[list[slice]], lengths: Lengths | None, length: int, tokens: int) -> Pattern:
    """Return the pattern of text that reads the video: each sample that of its number, or the only one of its row.

    `lengths` are the tokens of the videos of each row, None for one that fills it. A row's padding reads nothing if there are
    several videos. Raises ValueError for another number of samples than of videos.
    """
    if lengths is None or all(list(row) == [tokens] for row in lengths):
        return Pattern()
    spans = []
    for i, (row, videos) in enumerate(zip(samples, lengths, strict=True)):
        if len(videos) == 1:
            spans.append(Span(i, slice(0, length), slice(0, videos[0])))
            continue
        if len(row) != len(videos):
            raise ValueError(
                f"encoder_seq_lens has {len(videos)} videos in row {i}, whose text has {len(row)} samples; allowed: a video "
                "for each sample, in order, or one for all samples of the row. A sample begins at position 0"
            )
        stop = 0
        for s, count in zip(row, videos, strict=True):
            spans.append(Span(i, s, slice(stop, stop + count)))
            stop += count
    return Pattern(spans=tuple(spans))


def row_lengths(given: Tensor | Lengths, batch: int, tokens: int) -> list[list[int]]:
    """Return the lengths of the videos of each row, from a (B, S) tensor whose trailing zeros are padding, or from B lists.

    Raises TypeError for another type, ValueError for another number of rows, and for more tokens than a row has.
    """
    if isinstance(given, Tensor):
        if given.dim() != 2 or given.is_floating_point() or given.dtype == torch.bool:
            raise TypeError(f"encoder_seq_lens is {given.dtype} {tuple(given.shape)}; allowed: a tensor (B, S) of integers")
        rows = given.tolist()
        for row in rows:
            while len(row) > 1 and not row[-1]:
                row.pop()
    elif isinstance(given, list | tuple) and all(isinstance(row, list | tuple) for row in given):
        rows = [list(row) or [0] for row in given]
    else:
        raise TypeError(f"encoder_seq_lens is {given!r}; allowed: a tensor (B, S) of integers, or a list of each row's lengths")
    if len(rows) != batch:
        raise ValueError(f"encoder_seq_lens has {len(rows)} rows; allowed: {batch}, one for each row of video")
    for i, row in enumerate(rows):
        if not all(is_integer(n, 0) for n in row) or sum(row) > tokens:
            raise ValueError(f"encoder_seq_lens[{i}] is {row}; allowed: lengths from 0 up, whose sum is {tokens} at most")
    return rows


def video_segments(lengths: Lengths, tokens: int, device: torch.device) -> Int[Tensor, "B Lv"] | None:
    """Return `seq_idx` of the mixers, int32: the number of each token's video in its row; None where no row has several."""
    if all(len(row) == 1 for row in lengths):
        return None
    numbers = torch.empty(len(lengths), tokens, dtype=torch.int32)
    for row, videos in zip(numbers, lengths, strict=True):
        counts = torch.tensor([*videos, tokens - sum(videos)])
        row.copy_(torch.repeat_interleave(torch.arange(len(counts)), counts))
    return numbers.to(device, non_blocking=True)
