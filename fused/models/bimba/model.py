"""BIMBA: frames through a vision tower, a projector and the compressor into a language model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from fused.models.bimba.compressor import BimbaCompressor
from fused.models.bimba.load import Pretrained
from fused.models.bimba.queries import POOLS, bimba_queries
from fused.models.bimba.towers import language_model, patch_features, prepare_frames, vision_tower
from fused.models.conversation.turns import Turn, chat_text
from fused.rules import check_integer
from fused.runtime.checks import check_choice

VIDEO_TOKEN = -200  # stands for the video among the tokens of a prompt, as in LLaVA
NEWLINES = ("grid", "frame", "no_token")
FRAMES_AT_ONCE = 16  # in the vision tower
VIDEO_WORD = "<video>"  # its place in a turn's text, as in LLaVA's lists


class Bimba(Pretrained, nn.Module):
    """A video language model whose video tokens pass a `BimbaCompressor` (LLaVA-Video with Qwen2, arXiv 2503.09590).

    `config` is the base model's config.json: Qwen2's fields, `mm_spatial_pool_mode` (pool of the queries, "bilinear"),
    `temporal_pooling` (1), `mm_newline_position` ("grid", a newline token behind every row of queries; "frame", behind every
    frame; "no_token"), `compressor_type` ("mamba" or "attention") and, for other towers than the published one,
    `vision_config`. The language model sees the compressed tokens in the place of the prompt's VIDEO_TOKEN.

    Only video goes through the compressor. Conditioning on the question, as in the paper, was not released and is not here.
    Raises TypeError or ValueError for an option out of range, ImportError without transformers.
    """

    def __init__(self, config: Mapping[str, Any], backend: str = "auto") -> None:
        super().__init__()
        self.config = dict(config)
        self.pool, self.temporal_pooling, self.newline = compression(config)
        sizes = config.get("vision_config") or {}
        if not isinstance(sizes, Mapping):
            raise ValueError(f"Bimba: vision_config must be an object with the tower's sizes, got {sizes!r}")
        self.vision_tower = vision_tower(sizes)
        self.language_model = language_model(config)
        vision: Any = self.vision_tower.config
        self.image_size, D = vision.image_size, self.language_model.config.hidden_size
        self.rows = vision.image_size // vision.patch_size  # of a frame's patches
        self.mm_projector = nn.Sequential(nn.Linear(vision.hidden_size, D), nn.GELU(), nn.Linear(D, D))
        self.backend, self.compressor_kind = backend, config.get("compressor_type") or "mamba"
        self.compressor = self.new_compressor()
        self.image_newline = nn.Parameter(torch.randn(D) / D**0.5)

    def new_compressor(self) -> BimbaCompressor:
        """Return a compressor of this model with initial values."""
        width = self.language_model.config.hidden_size
        return BimbaCompressor(width, mixer_type=self.compressor_kind, backend=self.backend)

    def prepare_frames(self, frames: UInt8[Tensor, "F H W 3"]) -> Float[Tensor, "F 3 S S"]:
        """Return frames (F, H, W, 3) as the vision tower takes them: resized (bicubic) to its square, between -1 and 1."""
        return prepare_frames(frames, self.image_size)

    def encode_frames(self, frames: Float[Tensor, "F 3 S S"]) -> Float[Tensor, "F rows columns C"]:
        """Return the projected features of prepared frames, some of which are in the tower at a time.

        Raises ValueError for frames of another size.
        """
        expected = (3, self.image_size, self.image_size)
        if frames.dim() != 4 or tuple(frames.shape[1:]) != expected or not len(frames):
            raise ValueError(f"Bimba: frames must have shape (F, {', '.join(map(str, expected))}), got {tuple(frames.shape)}")
        weight: Any = self.mm_projector[0].weight
        parts = frames.to(weight.device, weight.dtype).split(FRAMES_AT_ONCE)
        return torch.cat([self.mm_projector(patch_features(self.vision_tower, part)) for part in parts])

    def compress(self, features: Float[Tensor, "F rows columns C"]) -> Float[Tensor, "V C"]:
        """Return the video tokens of the language model: compressed queries, raster order, with newline tokens among them."""
        queries = bimba_queries(features, self.pool, self.temporal_pooling)
        tokens = self.compressor(features[None], queries[None])[0]  # (G, Q, C)
        if self.newline == "no_token":
            return tokens.flatten(0, 1)
        rows = pooled_rows(features.shape[1], self.pool)
        grid = tokens.unflatten(1, (rows if self.newline == "grid" else 1, -1))
        newline = self.image_newline.to(grid.dtype).expand(*grid.shape[:2], 1, -1)
        return torch.cat((grid, newline), dim=2).flatten(0, 2)

    def embed(self, input_ids: Int[Tensor, "*B L"], video: Float[Tensor, "V C"] | None) -> Float[Tensor, "1 N C"]:
        """Return the language model's inputs: token embeddings, with the video in the place of VIDEO_TOKEN.

        Raises ValueError unless there is one such token for a video and none without.
        """
        ids, embedding = input_ids.flatten(), self.language_model.get_input_embeddings()
        place = (ids == VIDEO_TOKEN).nonzero().flatten().tolist()
        if len(place) != (video is not None):
            wanted = "one" if video is not None else "none, since there is no video"
            raise ValueError(f"Bimba: input_ids have {len(place)} video tokens ({VIDEO_TOKEN}); allowed is {wanted}")
        if video is None:
            return embedding(ids)[None]
        before, after = ids[: place[0]], ids[place[0] + 1 :]
        return torch.cat((embedding(before), video.to(embedding.weight.dtype), embedding(after)))[None]

    def forward(
        self, input_ids: Int[Tensor, "*B L"], frames: Float[Tensor, "F 3 S S"] | None = None,
        labels: Int[Tensor, "*B L"] | None = None,
    ) -> Any:  # fmt: skip
        """Return the language model's output, with `logits` (1, N, vocabulary), for one prompt and prepared frames.

        `labels`, as many as input_ids, add `loss`; of VIDEO_TOKEN and of the video nothing is asked.
        """
        video = None if frames is None else self.compress(self.encode_frames(frames))
        inputs = self.embed(input_ids, video)
        targets = None if labels is None else place_labels(input_ids, labels, video)[None]
        return self.language_model(inputs_embeds=inputs, labels=targets, use_cache=False)

    @torch.no_grad()
    def generate(
        self, input_ids: Int[Tensor, "*B L"], frames: Float[Tensor, "F 3 S S"] | None = None, **options: Any
    ) -> Int[Tensor, "1 T"]:
        """Return the tokens of an answer to a prompt with prepared frames; options are those of transformers' `generate`.

        Without options it is greedy, with at most 512 new tokens.
        """
        video = None if frames is None else self.compress(self.encode_frames(frames))
        inputs = self.embed(input_ids, video)
        mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
        options = {"max_new_tokens": 512, "do_sample": False} | options
        return self.language_model.generate(inputs_embeds=inputs, attention_mask=mask, **options)

    def tokenize(
        self, tokenizer: Any, question: str, seconds: Sequence[float] | None = None, duration: float | None = None
    ) -> Int[Tensor, "1 L"]:
        """Return the prompt of a question about a video, with VIDEO_TOKEN in it, on the model's device.

        `seconds` are the times of the frames and `duration` that of the video, for the instruction about time that upstream
        trains with, but does not give in its evaluation.
        """
        instruction = "" if seconds is None else time_instruction(seconds, duration)
        prompt = chat_text(tokenizer, [Turn("user", f"{VIDEO_WORD}\n{instruction}{question}")], answer_follows=True)
        before, after = prompt.split(VIDEO_WORD, 1)  # the question may hold the word too
        ids = [*tokenizer.encode(before, add_special_tokens=False), VIDEO_TOKEN]
        ids += tokenizer.encode(after, add_special_tokens=False)
        return torch.tensor([ids], device=self.image_newline.device)


def place_labels(
    input_ids: Int[Tensor, "*B L"], labels: Int[Tensor, "*B L"], video: Float[Tensor, "V C"] | None
) -> Int[Tensor, " N"]:
    """Return the labels of what `Bimba.embed` returns: those given, and -100 for each token of the video."""
    targets = labels.flatten()
    if video is None:
        return targets
    place = int((input_ids.flatten() == VIDEO_TOKEN).nonzero())
    return torch.cat((targets[:place], targets.new_full((len(video),), -100), targets[place + 1 :]))


def compression(config: Mapping[str, Any]) -> tuple[str, int, str]:
    """Return the pool of the queries, the frames of a mean, and where newline tokens stand, by a base model's config.json.

    Raises TypeError or ValueError for values that `Bimba` does not take.
    """
    pool, newline = config.get("mm_spatial_pool_mode") or "bilinear", config.get("mm_newline_position") or "grid"
    pooling = config.get("temporal_pooling") or 1
    check_choice("Bimba", "mm_newline_position", newline, NEWLINES)
    check_choice("Bimba", "mm_spatial_pool_mode", pool, POOLS)
    check_integer("Bimba", "temporal_pooling", pooling, 1)
    return pool, pooling, newline


def pooled_rows(rows: int, pool: str) -> int:
    """Return the rows of queries of so many rows of patches."""
    return -(-rows // 2) if pool == "bilinear" else rows // 2


def video_token_count(config: Mapping[str, Any], frames: int, rows: int) -> int:
    """Return the number of tokens that `Bimba.compress` makes of frames of rows x rows patches."""
    pool, pooling, newline = compression(config)
    side = pooled_rows(rows, pool)
    return frames // pooling * (side * side + {"grid": side, "frame": 1, "no_token": 0}[newline])


def time_instruction(seconds: Sequence[float], duration: float | None = None) -> str:
    """Return upstream's sentences about the times of the frames, in seconds; without `duration`, that of the last frame."""
    total = seconds[-1] if duration is None else duration
    times = ",".join(f"{s:.2f}s" for s in seconds)
    return (
        f"The video lasts for {total:.2f} seconds, and {len(seconds)} frames are uniformly sampled from it. "
        f"These frames are located at {times}.Please answer the following questions related to this video.\n"
    )
