"""The attention mixer with which BIMBA compares its scan."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

HEADS = 8


class Attention(nn.Module):
    """Full self-attention over E = expand * d_model channels in 8 heads, between two projections:

        q, k, v = qkv(in_proj(hidden))
        out     = out_proj(proj(softmax(q k^T / sqrt(E / 8)) v))

    Parameter names, shapes and initial values are upstream's; qkv has no bias. Raise ValueError for an E that is no multiple
    of 8.
    """

    def __init__(self, d_model: int, expand: int = 2) -> None:
        super().__init__()
        E = expand * d_model
        if E % HEADS:
            raise ValueError(f"expand * d_model is {E}; allowed for mixer_type 'attention' are multiples of {HEADS}")
        self.in_proj = nn.Linear(d_model, E)
        self.qkv = nn.Linear(E, 3 * E, bias=False)
        self.proj = nn.Linear(E, E)
        self.out_proj = nn.Linear(E, d_model)

    def forward(self, hidden: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Return the mixed tokens (B, L, D)."""
        q, k, v = self.qkv(self.in_proj(hidden)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, E/8)
        weights = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)
        return self.out_proj(self.proj((weights @ v).transpose(1, 2).flatten(2)))
