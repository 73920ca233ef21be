"""Which text token may read which other, and which video tokens: rows that are padded, packed, or go on from a cache.

A row of text holds one sample, or several one after another: a token whose positions are 0 on all three axes begins one. A row
of video holds the videos of these samples, in order, then padding.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Lengths = Sequence[Sequence[int]]


def read_attention_mask(
    given: Tensor | None, tokens: Tensor, cached: Bool[Tensor, "B P"] | None
) -> tuple[Bool[Tensor, "B M"], Bool[Tensor, "B L M"] | None]:
    """Return which of M = P + L keys are no padding, and which each token may read if `given` says so itself.

    `tokens` is (B, L, ...). `given` is None, (B, M), or (B, 1, L, M), of bool or of 0 and 1; True and 1 are tokens, or pairs,
    that count. `cached` says which of P cached tokens are no padding. Raise TypeError for another dtype, ValueError for another
    shape or device.
    """
    B, L = tokens.shape[:2]
    valid = torch.ones(B, L, dtype=torch.bool, device=tokens.device)
    valid = valid if cached is None else torch.cat((cached, valid), dim=1)
    if given is None:
        return valid, None
    if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex():
        found = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"attention_mask is {found}; allowed: a tensor of bool, or of integers 0 and 1")
    M = valid.shape[1]
    if tuple(given.shape) not in ((B, M), (B, 1, L, M)):
        raise ValueError(
            f"attention_mask has shape {tuple(given.shape)}; allowed: (B, M) = {(B, M)} or (B, 1, L, M) = {(B, 1, L, M)}, with "
            "the cached tokens before the new ones"
        )
    if given.device != tokens.device:
        raise ValueError(f"attention_mask is on {given.device}, the tokens are on {tokens.device}")
    return (given.bool(), None) if given.dim() == 2 else (valid, given[:, 0].bool())


def default_positions(valid: Bool[Tensor, "B L"], before: Int[Tensor, " B"]) -> Int[Tensor, "3 B L"]:
    """Return positions that count the valid tokens of each row, on from those `before`, the same on every axis.

    Padding has position 1, as upstream gives it.
    """
    counted = valid.long().cumsum(1) - 1 + before[:, None]
    return torch.where(valid, counted, 1).expand(3, -1, -1)


def text_samples(position_ids: Int[Tensor, "3 B L"], valid: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Return the number of the sample, from 0, that each token belongs to."""
    begins = (position_ids == 0).all(0) & valid
    return (begins.cumsum(1) - 1).clamp(min=0)


def causal_mask(samples: Int[Tensor, "B L"], valid: Bool[Tensor, "B M"]) -> Bool[Tensor, "B L M"]:
    """Return which keys each token may read: valid ones, of its own sample, not behind it.

    With M > L the first M - L keys are those of a cache, which every token may read.
    """
    B, L = samples.shape
    M = valid.shape[1]
    own = torch.ones(L, L, dtype=torch.bool, device=samples.device).tril() & (samples[:, :, None] == samples[:, None])
    past = torch.ones(B, L, M - L, dtype=torch.bool, device=samples.device)
    return torch.cat((past, own), dim=2) & valid[:, None]


def video_segments(lengths: Lengths, tokens: int, device: torch.device) -> Int[Tensor, "B Lv"]:
    """Return the number of the video, from 0, that each of a row's tokens belongs to; padding has the number after the last."""
    rows = []
    for row in lengths:
        counts = torch.tensor([*row, tokens - sum(row)])
        rows.append(torch.repeat_interleave(torch.arange(len(counts)), counts))
    return torch.stack(rows).to(device)


def cross_mask(samples: Int[Tensor, "B L"], segments: Int[Tensor, "B Lv"], lengths: Lengths) -> Bool[Tensor, "B L Lv"]:
    """Return which video tokens each text token may read: those of its sample's video.

    Every sample of a row with one video may read that one. Raise ValueError for another number of samples than of videos.
    """
    found = samples.amax(1).tolist() if samples.shape[1] else [0] * len(samples)
    shared = []
    for row, (last, videos) in enumerate(zip(found, lengths, strict=True)):
        if len(videos) > 1 and last + 1 != len(videos):
            raise ValueError(
                f"encoder_seq_lens has {len(videos)} videos in row {row}, whose text has {last + 1} samples; allowed: a video "
                "a sample, in order, or one for all samples of the row. Position 0 begins a sample"
            )
        shared.append(len(videos) == 1)
    padding = torch.tensor([len(videos) for videos in lengths], device=segments.device)[:, None]
    one = torch.tensor(shared, device=segments.device)[:, None, None]
    return ((samples[:, :, None] == segments[:, None]) | one) & (segments < padding)[:, None]


def row_lengths(given: Tensor | Lengths, batch: int, tokens: int) -> list[list[int]]:
    """Return the lengths of the videos of every row, from a (B, S) tensor whose trailing zeros are padding, or B lists.

    Raise TypeError for another type, ValueError for another number of rows and for more tokens than the row has.
    """
    if isinstance(given, Tensor):
        if given.dim() != 2 or given.is_floating_point() or given.dtype == torch.bool:
            raise TypeError(f"encoder_seq_lens is a {given.dtype} tensor {tuple(given.shape)}; allowed: integers (B, S)")
        rows = given.tolist()
        for row in rows:
            while len(row) > 1 and row[-1] == 0:
                row.pop()
    elif isinstance(given, Sequence) and all(isinstance(row, Sequence) for row in given):
        rows = [list(row) or [0] for row in given]
    else:
        raise TypeError(
            f"encoder_seq_lens is {given!r}; allowed: a (B, S) tensor of integers, or a list with the lengths of each row"
        )
    if len(rows) != batch:
        raise ValueError(f"encoder_seq_lens has {len(rows)} rows; allowed: one for each of the {batch} rows of video")
    for i, row in enumerate(rows):
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in row) or sum(row) > tokens:
            raise ValueError(f"encoder_seq_lens[{i}] is {row}; allowed: numbers of tokens from 0 up, {tokens} together at most")
    return rows
