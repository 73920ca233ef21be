"""A text encoder for video-text training: BERT, of the library transformers, with or without cross-attention to a video.

text = TextEncoder(BertModel(BertConfig(is_decoder=True, add_cross_attention=True)), video_width=576)
alone = text(words, padding)                        # for contrast: similarity(proj_v(video.pooled), proj_t(alone.pooled))
joint = text(words, padding, video=video.tokens)    # for matching and masked words: a head on joint.pooled, joint.words
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fused.models.retrieval.words import import_transformers
from fused.rules import check_integer
from fused.runtime.checks import check_tensor


class TextOutput(NamedTuple):
    """The output of `TextEncoder`."""

    words: Tensor  # (B, N, C)
    pooled: Tensor  # (B, C): BERT's pooler, or the first word, [CLS], of a BERT without one


class TextEncoder(nn.Module):
    """A `transformers.BertModel` (C = hidden_size), to be trained with a video model.

    With `video_width`, the D of the video model's tokens, every layer can attend to a video, projected to C: BERT's config
    then has add_cross_attention=True and is_decoder=True, which transformers requires for it. Attention among words is
    bidirectional in either case.

    Raises TypeError for another model, ValueError for one without cross-attention, ImportError without transformers.
    """

    def __init__(self, bert: Any, video_width: int | None = None) -> None:
        super().__init__()
        if not isinstance(bert, import_transformers().BertModel):
            raise TypeError(f"TextEncoder: bert must be a transformers BertModel, got {type(bert).__name__}")
        self.bert, self.project = bert, None
        if video_width is not None:
            check_integer("TextEncoder", "video_width", video_width, 1)
            if not bert.config.add_cross_attention:
                allowed = "is_decoder=True, add_cross_attention=True"
                raise ValueError(f"TextEncoder: bert must be built with {allowed} to read a video, got one without")
            self.project = nn.Linear(video_width, bert.config.hidden_size)

    def forward(
        self, words: Int[Tensor, "B N"], padding: Bool[Tensor, "B N"] | None = None, video: Float[Tensor, "B V D"] | None = None
    ) -> TextOutput:
        """Return features of the words, (B, N, C), and of the texts, (B, C).

        `words` is int64 (B, N), N at most BERT's number of positions. `padding` is bool (B, N), True for padding, which is
        `attention_mask == 0` of a tokenizer; None: no padding. `video` holds the tokens (B, V, D) for cross-attention; None:
        the text alone.

        Raises ValueError or TypeError for arguments that do not fit.
        """
        if words.dtype != torch.int64 or words.dim() != 2:
            raise ValueError(f"TextEncoder: words must be int64 (B, N), got {words.dtype} {tuple(words.shape)}")
        if padding is not None and (padding.dtype != torch.bool or padding.shape != words.shape):
            found = f"{padding.dtype} {tuple(padding.shape)}"
            raise ValueError(f"TextEncoder: padding must be bool {tuple(words.shape)} like words, or None, got {found}")
        projected = None
        if video is not None:
            if self.project is None:
                raise ValueError("TextEncoder: video must be None, since this one was made without video_width")
            check_tensor("TextEncoder", "video", video, "B V D", {"B": len(words), "D": self.project.in_features}, words.device)
            projected = self.project(video)
        mask = self._attention_mask(words, padding)
        output = self.bert(words, attention_mask=mask, encoder_hidden_states=projected, use_cache=False)
        pooled = output.last_hidden_state[:, 0] if output.pooler_output is None else output.pooler_output
        return TextOutput(output.last_hidden_state, pooled)

    def _attention_mask(self, words: Tensor, padding: Tensor | None) -> Tensor:
        """Return the additive attention mask (B, 1, N, N): 0, and the dtype's minimum for padding.

        All four dimensions are given, since transformers makes a causal mask for a decoder from one with fewer.
        """
        count, dtype = words.shape[1], self.bert.dtype
        hidden = torch.zeros_like(words, dtype=torch.bool) if padding is None else padding
        scores = torch.zeros(hidden.shape, dtype=dtype, device=words.device).masked_fill(hidden, torch.finfo(dtype).min)
        return scores[:, None, None].expand(-1, -1, count, -1)
