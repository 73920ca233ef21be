"""The places of queries among tokens: every query stands behind its stretch of tokens."""

import torch
from jaxtyping import Int
from torch import Tensor


def interleave(num_tokens: int, num_queries: int) -> Int[Tensor, " Q"]:
    """Return the places (num_queries,), int64 on the CPU and ascending, of the queries in the sequence of both.

    With N = num_tokens + num_queries and step = (N - 1) / num_queries in float64, query i (from 1) stands at

        trunc(step i)                              if i < (num_queries + 1) // 2
        trunc((N - 1) - step (num_queries - i))    otherwise

    which is what upstream takes from an integer `torch.linspace(0, N - 1, num_queries + 1)` on a CPU. The last place is N - 1.
    With r tokens a query, r whole, this is i (r + 1) - 1: r tokens, their query, r tokens, and so on.

    Raise ValueError for no token or no query: places are distinct from one token on.
    """
    for name, value in (("num_tokens", num_tokens), ("num_queries", num_queries)):
        if value < 1:
            raise ValueError(f"{name} is {value}; allowed is 1 or more: a query stands behind a stretch of tokens")
    last = num_tokens + num_queries - 1
    step = last / num_queries
    i = torch.arange(1, num_queries + 1, dtype=torch.float64)
    return torch.where(i < (num_queries + 1) // 2, step * i, last - step * (num_queries - i)).long()
