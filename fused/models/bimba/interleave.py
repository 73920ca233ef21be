"""Queries among tokens: their places, the sequence of both, and its parts."""

import functools
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fused.ops.selective_scan.query_rows import tile_queries


def interleave(num_tokens: int, num_queries: int) -> Int[Tensor, " Q"]:
    """Return the places (num_queries,), int64 on the CPU and ascending, of the queries in the sequence of both.

    Query i, from 1, is at element i of upstream's integer `linspace(0, N - 1, num_queries + 1)`, N = num_tokens + num_queries,
    as PyTorch computes it on a CPU: in float64, from the nearer end. It stands at the end of its stretch of tokens; with r
    tokens a query, r whole, at i (r + 1) - 1. Raises ValueError for no token or no query.
    """
    for name, value in (("num_tokens", num_tokens), ("num_queries", num_queries)):
        if value < 1:
            raise ValueError(f"{name} is {value}; allowed is 1 or more: a query stands behind a stretch of tokens")
    last = num_tokens + num_queries - 1
    step, half = last / num_queries, (num_queries + 1) // 2
    before = torch.arange(1, half, dtype=torch.float64) * step
    after = last - torch.arange(num_queries - max(half, 1), -1, -1, dtype=torch.float64) * step
    return torch.cat((before, after)).long()


class Places(NamedTuple):
    """The places of queries and tokens in their sequence, and what kernels and copies read of them, all on one device."""

    queries: Tensor  # (Q,) int64
    tokens: Tensor  # (T,) int64
    tile_queries: Tensor  # (tiles, 2) int32, the table of `selective_scan.query_rows`
    sources: Tensor  # (T + Q,) int32: the number of the token at each place, or -1 minus the number of the query
    ratio: int  # tokens of every query; 0 where they differ


@functools.lru_cache(64)
def places_of(num_tokens: int, num_queries: int, device: torch.device) -> Places:
    """Return the places of so many tokens and queries; they are computed on the CPU and copied once."""
    places = interleave(num_tokens, num_queries)
    return _on_device(places, num_tokens, 0 if num_tokens % num_queries else num_tokens // num_queries, device)


def places_between(
    places: Int[Tensor, " Q"], start: int, end: int, device: torch.device
) -> tuple[int, int, Places]:
    """Return the first query behind one of the tokens start to end - 1, the one after the last, and their places there.

    `places` are those of all queries among all tokens, on the CPU. The part's sequence begins with token `start`.
    """
    tokens_before = places - torch.arange(len(places))
    first, last = torch.searchsorted(tokens_before, torch.tensor([start, end]), right=True).tolist()
    return first, last, _on_device(places[first:last] - (start + first), end - start, 0, device)


def _on_device(queries: Tensor, num_tokens: int, ratio: int, device: torch.device) -> Places:
    """Return the places of a sequence of so many tokens and the queries at `queries`."""
    length = num_tokens + len(queries)
    is_token = torch.ones(length, dtype=torch.bool)
    is_token[queries] = False
    tokens, sources = is_token.nonzero().squeeze(1), torch.empty(length, dtype=torch.int32)
    sources[tokens] = torch.arange(len(tokens), dtype=torch.int32)
    sources[queries] = -1 - torch.arange(len(queries), dtype=torch.int32)
    at_queries, at_tokens, table, sources = (x.to(device) for x in (queries, tokens, tile_queries(queries, length), sources))
    return Places(at_queries, at_tokens, table, sources, ratio)


def insert(
    tokens: Float[Tensor, "B T C"], queries: Float[Tensor, "B Q C"], places: Places
) -> Float[Tensor, "B N C"]:
    """Return the sequence (B, T + Q, C) of tokens (B, T, C) and queries (B, Q, C)."""
    if places.ratio:
        stretches = tokens.unflatten(1, (queries.shape[1], places.ratio))
        return torch.cat((stretches, queries.unsqueeze(2)), dim=2).flatten(1, 2)
    sequence = tokens.new_empty(tokens.shape[0], tokens.shape[1] + queries.shape[1], tokens.shape[2])
    return sequence.index_copy_(1, places.tokens, tokens).index_copy_(1, places.queries, queries)


def extract(sequence: Float[Tensor, "B N C"], places: Places) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B Q C"]]:
    """Return the tokens (B, T, C) and the queries (B, Q, C) of their sequence."""
    if places.ratio:
        stretches = sequence.unflatten(1, (-1, places.ratio + 1))
        return stretches[:, :, :-1].flatten(1, 2), stretches[:, :, -1]
    return sequence.index_select(1, places.tokens), sequence.index_select(1, places.queries)
