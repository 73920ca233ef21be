"""The attention mixer with which BIMBA compares its scan, by PyTorch's scaled dot-product attention."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

HEADS = 8


class Attention(nn.Module):
    """Full self-attention over E = expand * d_model channels in 8 heads, between in_proj and proj, out_proj.

    Parameter names, shapes and initial values are upstream's, which computes the attention's weights as a tensor of its own,
    8 N^2 numbers. Raises ValueError for an E that is no multiple of 8.
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

    def forward(
        self, hidden: Float[Tensor, "B L D"], readers: Float[Tensor, "B Q D"] | None = None
    ) -> Float[Tensor, "B Q D"]:
        """Return the mixed tokens (B, L, D), or, of `readers` that are some of them, those (B, Q, D) alone."""
        x = self.in_proj(hidden)
        if readers is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            E = x.shape[-1]
            q = F.linear(self.in_proj(readers), self.qkv.weight[:E])
            k, v = F.linear(x, self.qkv.weight[E:]).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, tokens, E/8)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(self.proj(mixed.transpose(1, 2).flatten(2)))
