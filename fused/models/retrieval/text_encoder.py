"""BERT in two halves (video_mm of OpenGVLab/VideoMamba): layers that see words only, then layers that read the video too.

The first half's features of a text do not depend on the video: they are computed once and matched with any number of videos
by the second half alone. Keys and values of its attention to the video are projected from the video's width directly.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fused.models.retrieval.config import RetrievalConfig

EPS = 1e-12
HIDDEN = -10000.0  # is added to the score of a key that is padding, as upstream does


class BertEmbeddings(nn.Module):
    """LayerNorm(word + position + token type 0), and dropout."""

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, C)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, C)
        self.token_type_embeddings = nn.Embedding(2, C)
        self.LayerNorm = nn.LayerNorm(C, eps=EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Int[Tensor, "B N"]) -> Float[Tensor, "B N C"]:
        """Return the embedded words."""
        at = self.position_embeddings.weight[: ids.shape[1]] + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(self.word_embeddings(ids) + at))


class BertAttention(nn.Module):
    """Attention of words (B, N, C) to (B, M, width), with the residual connection and LayerNorm behind it."""

    def __init__(self, config: RetrievalConfig, width: int) -> None:
        super().__init__()
        C = config.hidden_size
        self.heads, self.rate = config.num_attention_heads, config.dropout
        self.self = nn.ModuleDict({"query": nn.Linear(C, C), "key": nn.Linear(width, C), "value": nn.Linear(width, C)})
        self.output = nn.ModuleDict({"dense": nn.Linear(C, C), "LayerNorm": nn.LayerNorm(C, eps=EPS)})
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "B N C"], read: Float[Tensor, "A M W"], mask: Tensor | None) -> Tensor:
        """Return x after it has read. `mask` (B, 1, 1, M) is added to the scores; None: nothing is.

        Without a mask `read` may have one row, which all B rows of x read: its keys and values are then computed once.
        """
        shared = mask is None and len(read) == 1
        inputs = {"query": x.flatten(0, 1)[None] if shared else x, "key": read, "value": read}
        q, k, v = (self.self[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name, y in inputs.items())
        rate = self.rate if self.training else 0.0
        if mask is None:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        else:  # of few words; kernels that take a mask round more than this does
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + mask.to(q.dtype)
            mixed = F.dropout(scores.softmax(dim=-1), rate) @ v
        mixed = mixed.transpose(1, 2).reshape(x.shape)
        return self.output["LayerNorm"](x + self.dropout(self.output["dense"](mixed)))


class BertLayer(nn.Module):
    """Attention to words, in layers of the second half attention to the video, and an MLP; LayerNorm is behind each."""

    def __init__(self, config: RetrievalConfig, index: int) -> None:
        super().__init__()
        C, reads_video = config.hidden_size, index >= config.fusion_layer
        self.attention = BertAttention(config, C)
        self.crossattention = BertAttention(config, config.video.embed_dim) if reads_video else None
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(C, config.intermediate_size)})
        dense = nn.Linear(config.intermediate_size, C)
        self.output = nn.ModuleDict({"dense": dense, "LayerNorm": nn.LayerNorm(C, eps=EPS)})
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "B N C"], mask: Tensor, video: Float[Tensor, "A V D"] | None) -> Tensor:
        """Return words (B, N, C) after the layer; `mask` (B, 1, 1, N) is added to the scores of words."""
        x = self.attention(x, x, mask)
        if self.crossattention is not None and video is not None:
            x = self.crossattention(x, video, None)
        mlp = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + self.dropout(mlp))


class MaskedWordsHead(nn.Module):
    """Dense, GELU, LayerNorm, then the product with the word embeddings, plus a bias."""

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = nn.ModuleDict({"dense": nn.Linear(C, C), "LayerNorm": nn.LayerNorm(C, eps=EPS)})

    def forward(self, x: Float[Tensor, "B N C"], words: Float[Tensor, "vocabulary C"]) -> Float[Tensor, "B N vocabulary"]:
        """Return logits, given the word embeddings."""
        return F.linear(self.transform["LayerNorm"](F.gelu(self.transform["dense"](x))), words, self.bias)


class SplitBert(nn.Module):
    """The text encoder, with upstream's parameter names. `text` is its mode "text", `fusion` its mode "fusion"."""

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        self.config = config
        layers = nn.ModuleList(BertLayer(config, i) for i in range(config.num_hidden_layers))
        self.bert = nn.ModuleDict({"embeddings": BertEmbeddings(config), "encoder": nn.ModuleDict({"layer": layers})})
        self.cls = nn.ModuleDict({"predictions": MaskedWordsHead(config)}) if config.mlm else None

    @property
    def layers(self) -> Any:
        """All layers, of both halves: a ModuleList."""
        return self.bert["encoder"]["layer"]  # type: ignore[index]

    def text(self, ids: Int[Tensor, "B N"], visible: Bool[Tensor, "B N"]) -> Float[Tensor, "B N C"]:
        """Return the features of words, int64 ids of the vocabulary; `visible` is False for padding.

        Raises ValueError for a text of more words than there are positions, and for ids and `visible` of other shapes.
        """
        if ids.dim() != 2 or ids.shape != visible.shape or ids.shape[1] > self.config.max_position_embeddings:
            allowed = f"two of the same shape (B, N), N at most {self.config.max_position_embeddings}"
            raise ValueError(f"ids have shape {tuple(ids.shape)} and visible {tuple(visible.shape)}; allowed: {allowed}")
        x, mask = self.bert["embeddings"](ids), added_mask(visible)
        for layer in self.layers[: self.config.fusion_layer]:
            x = layer(x, mask, None)
        return x

    def fusion(
        self, text: Float[Tensor, "B N C"], visible: Bool[Tensor, "B N"], video: Float[Tensor, "A V D"]
    ) -> Float[Tensor, "B N C"]:
        """Return the words after they have read the video, for the features that `text` returned.

        `video` is (B, V, D), or (1, V, D), one that all texts read.
        """
        mask = added_mask(visible)
        for layer in self.layers[self.config.fusion_layer :]:
            text = layer(text, mask, video)
        return text

    def predict(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N vocabulary"]:
        """Return logits over the vocabulary for the output of `fusion`. Raises ValueError for a model without the head."""
        if self.cls is None:
            raise ValueError("mlm is False: this model has no head for masked words")
        return self.cls["predictions"](x, self.bert.get_submodule("embeddings.word_embeddings").weight)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw BERT's initial values: N(0, 0.02) for all weights of products and embeddings at width 768, biases 0.

        Weights of a narrower model are larger by the root of the widths' ratio: the words then reach [CLS] as strongly.
        """
        std = 0.02 * (768 / self.config.hidden_size) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, std)
            if isinstance(module, nn.Linear):
                module.bias.zero_()


def added_mask(visible: Bool[Tensor, "B N"]) -> Float[Tensor, "B 1 1 N"]:
    """Return what is added to the scores of keys: 0, and -10000 for those that are padding."""
    return torch.where(visible, 0.0, HIDDEN)[:, None, None]
