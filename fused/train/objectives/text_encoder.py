"""Text beside a video: BERT, of the library transformers, reads words alone or with a video in its cross-attention.

text = TextEncoder(BertModel(BertConfig(is_decoder=True, add_cross_attention=True)), video_width=576)
alone = text(words, padding)                        # for contrast: similarity(proj_v(video.pooled), proj_t(alone.pooled))
beside = text(words, padding, video=video.tokens)   # for matching and masked words: a head on beside.pooled, beside.words
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fused.rules import check_integer
from fused.runtime.checks import check_tensor
from fused.train.objectives.teachers import import_transformers


class TextOutput(NamedTuple):
    """What `TextEncoder` returns."""

    words: Tensor  # (B, N, C)
    pooled: Tensor  # (B, C): BERT's pooler, or where it has none the first word, [CLS]


class TextEncoder(nn.Module):
    """A `transformers.BertModel` (C = hidden_size) that is trained together with a video model.

    With `video_width`, the D of the video model's tokens, it can read a video, projected to C, in the cross-attention of
    every layer: its config then has is_decoder=True (which transformers asks for) and add_cross_attention=True. Words see
    the words before and behind them in either case.

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
        """`words` int64, at most as many as BERT has positions; `padding` True where there is none (None: nowhere), of a
        tokenizer `attention_mask == 0`; `video` the tokens beside which they are read.

        Raises ValueError or TypeError for what does not fit.
        """
        if words.dtype != torch.int64 or words.dim() != 2:
            raise ValueError(f"TextEncoder: words must be int64 (B, N), got {words.dtype} {tuple(words.shape)}")
        if padding is not None and (padding.dtype != torch.bool or padding.shape != words.shape):
            came = f"{padding.dtype} {tuple(padding.shape)}"
            raise ValueError(f"TextEncoder: padding must be bool {tuple(words.shape)} like words, or None, got {came}")
        beside = None
        if video is not None:
            if self.project is None:
                raise ValueError("TextEncoder: video must be None, since this one was made without video_width")
            check_tensor("TextEncoder", "video", video, "B V D", {"B": len(words), "D": self.project.in_features}, words.device)
            beside = self.project(video)
        output = self.bert(words, attention_mask=self._seen(words, padding), encoder_hidden_states=beside, use_cache=False)
        first = output.last_hidden_state[:, 0] if output.pooler_output is None else output.pooler_output
        return TextOutput(output.last_hidden_state, first)

    def _seen(self, words: Tensor, padding: Tensor | None) -> Tensor:
        """What is added to the scores (B, 1, N, N): all words but padding are seen. Given whole, else a decoder's words see
        only those before them."""
        count, dtype = words.shape[1], self.bert.dtype
        hidden = torch.zeros_like(words, dtype=torch.bool) if padding is None else padding
        scores = torch.zeros(hidden.shape, dtype=dtype, device=words.device).masked_fill(hidden, torch.finfo(dtype).min)
        return scores[:, None, None].expand(-1, -1, count, -1)
