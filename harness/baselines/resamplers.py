"""Other ways from a video's tokens to as many as `BimbaCompressor` gives: pooling, a perceiver resampler, self-attention.

The two attentions are one layer as BIMBA's is: the tokens are normed, the queries are added to what is mixed, and no
feed-forward follows. Heads are 128 channels wide.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from harness.baselines.attention import attend

HEAD = 128  # channels of a head; a narrower model has one head

Tokens = Float[Tensor, "B F H W D"]
Queries = Float[Tensor, "B G Q D"]


class Pooling(nn.Module):
    """The mean over F / G frames, and over windows of 2 x 2 tokens; those at the border of an odd frame are smaller."""

    def forward(self, tokens: Tokens, queries: Queries) -> Queries:
        """Return pooled tokens, as many as the queries, of which only the shape is read. F is a multiple of G."""
        B, G, Q, D = queries.shape
        frames = tokens.unflatten(1, (G, -1)).mean(2).flatten(0, 1)
        pooled = F.avg_pool2d(frames.permute(0, 3, 1, 2), 2, ceil_mode=True)
        return pooled.permute(0, 2, 3, 1).reshape(B, G, Q, D)


class Resampler(nn.Module):
    """The parameters of both attentions: `kind` of `attention.KINDS` computes them."""

    def __init__(self, D: int, kind: str = "sdpa") -> None:
        super().__init__()
        self.kind, self.heads = kind, max(1, D // HEAD)
        self.norm = nn.LayerNorm(D)
        self.q, self.k, self.v, self.out = (nn.Linear(D, D, bias=False) for _ in range(4))

    def mix(self, readers: Float[Tensor, "B L D"], read: Float[Tensor, "B M D"]) -> Float[Tensor, "B L D"]:
        """Return what `readers` take from the tokens `read`."""
        pairs = (self.q, readers), (self.k, read), (self.v, read)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, x in pairs)
        return self.out(attend(q, k, v, self.kind).transpose(1, 2).flatten(2))


class PerceiverResampler(Resampler):
    """Cross-attention: the queries, which a model would learn, read the tokens."""

    def forward(self, tokens: Tokens, queries: Queries) -> Queries:
        """Return the queries with what they have read."""
        flat = queries.flatten(1, 2)
        return (flat + self.mix(self.norm(flat), self.norm(tokens.flatten(1, 3)))).view(queries.shape)


class SelfAttention(Resampler):
    """Self-attention over all tokens and queries, of which the queries go on."""

    def forward(self, tokens: Tokens, queries: Queries) -> Queries:
        """Return the queries with what they have read."""
        flat = queries.flatten(1, 2)
        x = self.norm(torch.cat((tokens.flatten(1, 3), flat), dim=1))
        return (flat + self.mix(x, x)[:, -flat.shape[1] :]).view(queries.shape)
