"""Video-text retrieval (video_mm of OpenGVLab/VideoMamba): BERT in two halves, the heads above it, and the losses.

The video comes as an encoder's output: tokens (B, V, D), and pooled (B, T, D), a vector for each frame.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reference.ops.dtypes import accumulation_dtype

HIDDEN = -10000.0  # is added to the score of a key that is padding
IGNORED = -100  # the label of a word that is not predicted


@dataclass(frozen=True)
class RetrievalConfig:
    """The sizes of `VideoTextHeads`; the defaults are those of BERT base and VideoMamba-M, as published."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    fusion_layer: int = 9  # the first layer that reads the video
    video_width: int = 576
    embed_dim: int = 512  # of the space in which videos and texts are compared
    mlm: bool = True  # whether there is a head for masked words


class BertEmbeddings(nn.Module):
    """LayerNorm(word + position + token type 0)."""

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, C)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, C)
        self.token_type_embeddings = nn.Embedding(2, C)
        self.LayerNorm = nn.LayerNorm(C, eps=1e-12)

    def forward(self, ids: Int[Tensor, "B N"]) -> Float[Tensor, "B N C"]:
        """Return the embedded words."""
        positions = self.position_embeddings.weight[: ids.shape[1]]
        return self.LayerNorm(self.word_embeddings(ids) + positions + self.token_type_embeddings.weight[0])


class BertAttention(nn.Module):
    """LayerNorm(x + W softmax(q k^T / sqrt(C / heads) + mask) v), with keys and values of `width` channels."""

    def __init__(self, config: RetrievalConfig, width: int) -> None:
        super().__init__()
        C, self.heads = config.hidden_size, config.num_attention_heads
        self.self = nn.ModuleDict({"query": nn.Linear(C, C), "key": nn.Linear(width, C), "value": nn.Linear(width, C)})
        self.output = nn.ModuleDict({"dense": nn.Linear(C, C), "LayerNorm": nn.LayerNorm(C, eps=1e-12)})

    def forward(self, x: Tensor, read: Tensor, visible: Tensor | None) -> Tensor:
        """Return x (B, N, C) after it has read (B, M, width), of which `visible` (B, M) are no padding (None: all)."""
        inputs = {"query": x, "key": read, "value": read}
        q, k, v = (self.self[n](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n, y in inputs.items())
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # (B, heads, N, M)
        if visible is not None:
            scores = scores + HIDDEN * (~visible).to(scores.dtype)[:, None, None]
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        return self.output["LayerNorm"](x + self.output["dense"](mixed))


class BertLayer(nn.Module):
    """Self-attention, in fusion layers attention to the video, and an MLP; LayerNorm comes behind each."""

    def __init__(self, config: RetrievalConfig, reads_video: bool) -> None:
        super().__init__()
        C = config.hidden_size
        self.attention = BertAttention(config, C)
        self.crossattention = BertAttention(config, config.video_width) if reads_video else None
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(C, config.intermediate_size)})
        dense = nn.Linear(config.intermediate_size, C)
        self.output = nn.ModuleDict({"dense": dense, "LayerNorm": nn.LayerNorm(C, eps=1e-12)})

    def forward(self, x: Tensor, visible: Tensor, video: Tensor | None) -> Tensor:
        """Return words (B, N, C) after the layer; `visible` is bool (B, N), `video` (B, V, D) or None."""
        x = self.attention(x, x, visible)
        if self.crossattention is not None and video is not None:
            x = self.crossattention(x, video, None)
        mlp = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + mlp)


class BertModel(nn.Module):
    """Embeddings and layers, without a pooler."""

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        layers = [BertLayer(config, i >= config.fusion_layer) for i in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    @property
    def layers(self) -> Any:
        """The layers, a ModuleList."""
        return self.encoder["layer"]


class MaskedWordsHead(nn.Module):
    """Dense, GELU, LayerNorm, then the product with the word embeddings, plus a bias."""

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = nn.ModuleDict({"dense": nn.Linear(C, C), "LayerNorm": nn.LayerNorm(C, eps=1e-12)})

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """Return logits (B, N, vocabulary) for (B, N, C) and the word embeddings (vocabulary, C)."""
        return F.linear(self.transform["LayerNorm"](F.gelu(self.transform["dense"](x))), words, self.bias)


class TextEncoder(nn.Module):
    """BERT whose first `fusion_layer` layers see words only, and whose other layers read the video too."""

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        self.fusion_layer = config.fusion_layer
        self.bert = BertModel(config)
        self.cls = nn.ModuleDict({"predictions": MaskedWordsHead(config)}) if config.mlm else None

    def text(self, ids: Int[Tensor, "B N"], visible: Bool[Tensor, "B N"]) -> Float[Tensor, "B N C"]:
        """Return the features of words, which do not depend on the video."""
        x = self.bert.embeddings(ids)
        for layer in self.bert.layers[: self.fusion_layer]:
            x = layer(x, visible, None)
        return x

    def fusion(
        self, text: Float[Tensor, "B N C"], visible: Bool[Tensor, "B N"], video: Float[Tensor, "B V D"]
    ) -> Float[Tensor, "B N C"]:
        """Return the words after they have read the video, for features of `text`."""
        for layer in self.bert.layers[self.fusion_layer :]:
            text = layer(text, visible, video)
        return text


class VideoTextHeads(nn.Module):
    """The model without its video encoder. Parameter names and shapes are upstream's, but for what is stored twice there."""

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        self.text_encoder = TextEncoder(config)
        self.vision_proj = nn.Linear(config.video_width, config.embed_dim)
        self.text_proj = nn.Linear(config.hidden_size, config.embed_dim)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.itm_head = nn.Linear(config.hidden_size, 2)

    def similarity(self, pooled: Float[Tensor, "B T D"], text: Float[Tensor, "N L C"]) -> Float[Tensor, "B N"]:
        """Return cosines of videos and texts over the temperature, the mean over the frames of a video."""
        return similarity(self.vision_proj(pooled), self.text_proj(text[:, 0]), self.temp)

    def match(
        self, video: Float[Tensor, "B V D"], text: Float[Tensor, "B N C"], visible: Bool[Tensor, "B N"]
    ) -> Float[Tensor, "B 2"]:
        """Return logits of (no match, match) for each pair of a video's tokens and a text's features."""
        return self.itm_head(self.text_encoder.fusion(text, visible, video)[:, 0])

    def predict_words(
        self, video: Float[Tensor, "B V D"], ids: Int[Tensor, "B N"], visible: Bool[Tensor, "B N"]
    ) -> Float[Tensor, "B N words"]:
        """Return logits over the vocabulary for every place of masked texts."""
        encoder = self.text_encoder
        assert encoder.cls is not None, "config.mlm is False"
        fused = encoder.fusion(encoder.text(ids, visible), visible, video)
        return encoder.cls["predictions"](fused, encoder.bert.embeddings.word_embeddings.weight)


def similarity(video: Float[Tensor, "B T E"], text: Float[Tensor, "N E"], temp: Tensor | float) -> Float[Tensor, "B N"]:
    """Return the mean over frames of cos(video m frame l, text n) / temp, in at least float32."""
    precise = accumulation_dtype(video.dtype)
    video, text = F.normalize(video.to(precise), dim=-1), F.normalize(text.to(precise), dim=-1)
    return (video[:, :, None] * text).sum(dim=-1).mean(dim=1) / temp


def contrastive_loss(v2t: Float[Tensor, "B B"], ids: Int[Tensor, " B"]) -> Float[Tensor, ""]:
    """Return VTC: cross-entropy of videos over texts and of texts over videos, halved. Pairs of equal ids share the target."""
    positives = (ids[:, None] == ids).to(v2t.dtype)
    targets = positives / positives.sum(dim=1, keepdim=True)
    return -((targets * v2t.log_softmax(1)).sum(1).mean() + (targets * v2t.T.log_softmax(1)).sum(1).mean()) / 2


def negative_weights(similarities: Float[Tensor, "B B"], ids: Int[Tensor, " B"]) -> Float[Tensor, "B B"]:
    """Return the weights by which a row's hard negative is drawn: the row's softmax, and 0 where the ids are equal."""
    return similarities.softmax(dim=1).masked_fill(ids[:, None] == ids, 0)


def matching_loss(logits: Float[Tensor, "pairs 2"]) -> Float[Tensor, ""]:
    """Return VTM: cross-entropy of 3B pairs, of which the first B match, in at least float32."""
    labels = (torch.arange(len(logits), device=logits.device) < len(logits) // 3).long()
    return F.cross_entropy(logits.to(accumulation_dtype(logits.dtype)), labels)


def masked_language_loss(logits: Float[Tensor, "B N words"], labels: Int[Tensor, "B N"]) -> Float[Tensor, ""]:
    """Return MLM: the mean cross-entropy of the words whose label is not -100, in at least float32."""
    rows = logits.to(accumulation_dtype(logits.dtype)).flatten(0, 1)
    return F.cross_entropy(rows, labels.flatten(), ignore_index=IGNORED)


def alignment_loss(student: Float[Tensor, "*tokens E"], teacher: Float[Tensor, "*tokens E"]) -> Float[Tensor, ""]:
    """Return UTA: the mean over tokens of 2 - 2 cos(student, teacher), in at least float32; the teacher gets no gradient."""
    precise = accumulation_dtype(student.dtype)
    student, teacher = (F.normalize(x.to(precise), dim=-1) for x in (student, teacher.detach()))
    return (2 - 2 * (student * teacher).sum(dim=-1)).mean()


def ranks(scores: Float[Tensor, "N M"], right: Bool[Tensor, "N M"]) -> Int[Tensor, " N"]:
    """Return for each row the rank, from 0, of its best right column; among equal scores the higher column comes first."""
    order = scores.flip(1).argsort(dim=1, descending=True, stable=True)  # of flipped columns: the higher one first
    return right.flip(1).gather(1, order).int().argmax(dim=1)


def recalls(ranks: Int[Tensor, " N"], most: tuple[int, ...] = (1, 5, 10)) -> Float[Tensor, " K"]:
    """Return the share of rows, in percent, whose rank is below each of `most`."""
    return torch.stack([100 * (ranks < k).double().mean() for k in most])
