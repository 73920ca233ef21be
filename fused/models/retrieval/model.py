"""The video-text model of video_mm: a VideoMamba encoder, BERT in two halves, and the heads that compare and match them."""

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fused.io.preprocessing import Preprocessing
from fused.models.retrieval.config import RetrievalConfig
from fused.models.retrieval.hub import Pretrained
from fused.models.retrieval.ranking import cosines
from fused.models.retrieval.text_encoder import SplitBert
from fused.models.videomamba.model import EncoderOutput, VideoMambaEncoder

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.001, 0.5
FIRST_TEMPERATURE = 0.07


class VideoTextHeads(nn.Module):
    """The model without its video encoder: videos come as tokens (B, V, D) and pooled vectors (B, T, D) of their frames."""

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        if not isinstance(config, RetrievalConfig):
            raise TypeError(f"config is a {type(config).__name__}; allowed: a RetrievalConfig")
        self.config = config
        self.text_encoder = SplitBert(config)
        self.vision_proj = nn.Linear(config.video.embed_dim, config.embed_dim)
        self.text_proj = nn.Linear(config.hidden_size, config.embed_dim)
        self.temp = nn.Parameter(torch.tensor(FIRST_TEMPERATURE))
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.text_encoder.init_weights()

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the temperature in [0.001, 0.5], in place, as upstream does before every training step."""
        self.temp.clamp_(LEAST_TEMPERATURE, MOST_TEMPERATURE)

    def similarity(self, pooled: Float[Tensor, "B T D"], text: Float[Tensor, "N L C"]) -> Float[Tensor, "B N"]:
        """Return cosines of videos and texts over the temperature, in at least float32: the mean over a video's frames.

        `pooled` is an encoder's, `text` what the text encoder's `text` returned, of which the first word, [CLS], is read.
        """
        return cosines(self.vision_proj(pooled), self.text_proj(text[:, 0])) / self.temp

    def match(
        self, video: Float[Tensor, "A V D"], text: Float[Tensor, "B N C"], visible: Bool[Tensor, "B N"]
    ) -> Float[Tensor, "B 2"]:
        """Return logits of (no match, match) for each pair of a video's tokens and a text's features.

        `video` is (B, V, D), or (1, V, D), one video with every text: its keys and values are then computed once. `text` is
        what `encode_text` returned for `visible`, which is False for padding.
        """
        return self.itm_head(self.text_encoder.fusion(text, visible, video)[:, 0])

    def predict_words(
        self, video: Float[Tensor, "B V D"], ids: Int[Tensor, "B N"], visible: Bool[Tensor, "B N"]
    ) -> Float[Tensor, "B N vocabulary"]:
        """Return logits over the vocabulary for every place of texts some of whose words are masked.

        `video` is as in `match`, `ids` and `visible` are as in `encode_text`. Raises ValueError for a model without the head.
        """
        encoder = self.text_encoder
        return encoder.predict(encoder.fusion(encoder.text(ids, visible), visible, video))


class RetrievalOutput(NamedTuple):
    """The output of `VideoTextRetrieval`, for B videos and N texts."""

    similarity: Tensor  # (B, N) cosines over the temperature
    tokens: Tensor  # (B, V, D) of the videos
    text: Tensor  # (N, L, C) features of the words, for `match`


class VideoTextRetrieval(Pretrained, VideoTextHeads):
    """Find videos by text and text by videos: the multi-modality model of VideoMamba (arXiv 2403.06977).

    Its parameters have upstream's names. `vocabulary` is the file of words that ids refer to, and `preprocessing` says how
    clips are made; a folder of `save_pretrained` keeps both.
    """

    vocabulary: Path | None = None
    preprocessing: Preprocessing | None = None

    def __init__(self, config: RetrievalConfig, backend: str = "auto") -> None:
        super().__init__(config)
        self.vision_encoder = VideoMambaEncoder(config.video, backend)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.temp.device

    def encode_video(
        self, clips: Float[Tensor, "B C T H W"], *, visible: Int[Tensor, "B V"] | None = None, keep_temporal: bool = True
    ) -> EncoderOutput:
        """Return tokens (B, V, D) without CLS and pooled (B, T, D), a vector for each frame, of clips (B, 3, T, H, W).

        In a model of more, a clip of one tubelet, such as an image (B, 3, H, W), has no temporal position. `visible` are the
        encoder's, for masked pretraining; unless each frame then has as many tokens, `keep_temporal` is False and pooled is
        (B, 1, D).
        """
        if clips.dim() == 4:
            clips = clips[:, :, None]
        clips = clips.to(self.vision_encoder.cls_token.dtype)
        video = self.config.video
        is_image = clips.shape[2] == video.kernel_size != video.num_frames
        return self.vision_encoder(clips, use_image=is_image, keep_temporal=keep_temporal, visible=visible)

    def encode_text(self, ids: Int[Tensor, "N L"], visible: Bool[Tensor, "N L"]) -> Float[Tensor, "N L C"]:
        """Return the features of the words of texts, by the half of BERT that sees no video.

        `ids` and `visible` are a `Tokenizer`'s. Raises ValueError for more words than there are positions, and for other
        shapes.
        """
        return self.text_encoder.text(ids, visible)

    def forward(
        self, clips: Float[Tensor, "B C T H W"], ids: Int[Tensor, "N L"], visible: Bool[Tensor, "N L"]
    ) -> RetrievalOutput:
        """Return the similarities of every clip and every text, and what `match` takes.

        `ids` and `visible` are a `Tokenizer`'s. Raises ValueError or TypeError for arguments that do not fit.
        """
        output, text = self.encode_video(clips), self.encode_text(ids, visible)
        assert output.pooled is not None
        return RetrievalOutput(self.similarity(output.pooled, text), output.tokens, text)
