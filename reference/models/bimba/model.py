"""BIMBA: frames through a vision tower, a projector and the compressor into a language model."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reference.models.bimba.compressor import BimbaCompressor
from reference.models.bimba.queries import bimba_queries

VIDEO_TOKEN = -200  # stands for the video among the tokens of a prompt, as in LLaVA
IGNORED = -100  # the label of a token that is not learnt


class Bimba(nn.Module):
    """A video language model whose video tokens pass a compressor (LLaVA-Video with Qwen2, arXiv 2503.09590):

        features = projector(vision_tower(frames))                      F frames of rows x columns patches
        video    = compressor(features, bimba_queries(features))        G frames of pooled rows x pooled columns
        output   = language_model(text before VIDEO_TOKEN, video, text behind it)

    `vision_tower` is a `SiglipVisionModel` of the library transformers, read behind its last layer and before its last norm,
    and `language_model` a `Qwen2ForCausalLM`. `pool` and `temporal_pooling` are those of `bimba_queries`. A newline token,
    which is learnt, stands behind every row of queries (`newline` "grid"), behind every frame ("frame") or nowhere
    ("no_token"). `compressor_type` is the compressor's `mixer_type`.

    One video and one prompt at a time. Only video passes the compressor. Conditioning on the question, as in the paper, was not
    released and is not here. Raise ValueError for an unknown `newline` or `compressor_type`.
    """

    def __init__(
        self, vision_tower: nn.Module, language_model: nn.Module, pool: str = "bilinear", temporal_pooling: int = 1,
        newline: str = "grid", compressor_type: str = "mamba",
    ) -> None:  # fmt: skip
        super().__init__()
        if newline not in ("grid", "frame", "no_token"):
            raise ValueError(f"newline is {newline!r}; allowed are 'grid', 'frame' and 'no_token'")
        self.pool, self.temporal_pooling, self.newline = pool, temporal_pooling, newline
        self.vision_tower, self.language_model = vision_tower, language_model
        sizes: list[Any] = [vision_tower.config, language_model.config]
        E, D = (config.hidden_size for config in sizes)
        self.mm_projector = nn.Sequential(nn.Linear(E, D), nn.GELU(), nn.Linear(D, D))
        self.compressor = BimbaCompressor(D, mixer_type=compressor_type)
        self.image_newline = nn.Parameter(torch.randn(D) / D**0.5)

    def encode_frames(self, frames: Float[Tensor, "F 3 S S"]) -> Float[Tensor, "F rows columns D"]:
        """Return the projected features of frames (F, 3, S, S) of the tower's size, with values between -1 and 1."""
        tower: Any = getattr(self.vision_tower, "vision_model", self.vision_tower)  # the library's versions differ
        patches = tower.encoder(inputs_embeds=tower.embeddings(frames)).last_hidden_state
        return self.mm_projector(patches).unflatten(1, (-1, frames.shape[3] // tower.embeddings.patch_size))

    def compress(self, features: Float[Tensor, "F rows columns D"]) -> Float[Tensor, "V D"]:
        """Return the video tokens that the language model reads: compressed queries in raster order, and newline tokens."""
        queries = bimba_queries(features, self.pool, self.temporal_pooling)
        columns = -(-features.shape[2] // 2) if self.pool == "bilinear" else features.shape[2] // 2
        lines = self.compressor(features[None], queries[None])[0]  # (G, rows * columns, D)
        if self.newline == "no_token":
            return lines.flatten(0, 1)
        if self.newline == "grid":
            lines = lines.unflatten(1, (-1, columns)).flatten(0, 1)  # (G * rows, columns, D)
        return torch.cat((lines, self.image_newline.expand(len(lines), 1, -1)), dim=1).flatten(0, 1)

    def forward(
        self, input_ids: Int[Tensor, " L"], frames: Float[Tensor, "F 3 S S"] | None = None,
        labels: Int[Tensor, " L"] | None = None,
    ) -> Any:  # fmt: skip
        """Return the language model's output, with `logits` (1, N, vocabulary), and `loss` if there are labels.

        `input_ids` hold VIDEO_TOKEN once where the frames' video belongs; without frames not at all. Of the video nothing is
        learnt. Raise ValueError for another number of VIDEO_TOKEN.
        """
        places = (input_ids == VIDEO_TOKEN).nonzero().flatten().tolist()
        if len(places) != (frames is not None):
            raise ValueError(f"input_ids hold {len(places)} video tokens ({VIDEO_TOKEN}); allowed is one for frames, else none")
        model: Any = self.language_model
        embedding = model.get_input_embeddings()
        if frames is None:
            inputs = embedding(input_ids)
        else:
            [place] = places
            video = self.compress(self.encode_frames(frames))
            inputs = torch.cat((embedding(input_ids[:place]), video, embedding(input_ids[place + 1 :])))
            if labels is not None:
                labels = torch.cat((labels[:place], labels.new_full((len(video),), IGNORED), labels[place + 1 :]))
        return model(inputs_embeds=inputs[None], labels=None if labels is None else labels[None], use_cache=False)
