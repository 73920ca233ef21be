"""Vamba: a decoder whose text reads a video, and whose video passes Mamba-2 mixers."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused import backends
from fused.models.vamba.cache import LayerMemory, VambaCache, layer_pairs
from fused.models.vamba.checks import check_kinds
from fused.models.vamba.config import VambaConfig
from fused.models.vamba.generate import Generates
from fused.models.vamba.layer import NO_POSITIONS, Shared, VambaDecoderLayer
from fused.models.vamba.load import Pretrained
from fused.models.vamba.loss import next_token_loss
from fused.models.vamba.pattern import (
    Lengths,
    Pattern,
    causal_pattern,
    continued_pattern,
    cross_pattern,
    default_positions,
    read_attention_mask,
    row_lengths,
    text_spans,
    video_segments,
)
from fused.models.vamba.prefill import EncodesVideo
from fused.modules.mamba import check_backend
from fused.modules.norm import Norm


class VambaOutput(NamedTuple):
    """The outputs of a `Vamba`."""

    logits: Tensor  # (B, L, vocab_size)
    loss: Tensor | None = None  # with labels
    cache: VambaCache | None = None  # with use_cache


class Decoder(nn.Module):
    """The embedding, the layers and the final norm: upstream's `model.*`."""

    def __init__(self, config: VambaConfig, backend: str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = (VambaDecoderLayer(config, i, backend=backend) for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)


class Vamba(EncodesVideo, Generates, Pretrained, nn.Module):
    """A language model over text and the merged tokens of a vision tower (arXiv 2503.11579).

    The state_dict has upstream's keys, and with a vision tower in `visual` its keys too. The text holds no place for video
    tokens. Video tokens read no text, so that `encode_video` serves any question. The mixer of the last layer has no effect,
    is not run, and keeps its weights. `backend` is a name of `fused.backends`, or "auto".
    """

    def __init__(self, config: VambaConfig, backend: str = "auto") -> None:
        super().__init__()
        self.config, self.backend = config, check_backend(backend)
        self.model = Decoder(config, backend)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.visual: nn.Module | None = None  # a vision tower of transformers, see `fused.models.vamba.vision`
        self.stop_tokens: tuple[int, ...] = ()  # after which `generate` ends
        self.recompute_layers = False  # in a backward, so that a training keeps the streams between layers only

    def forward(
        self,
        input_ids: Int[Tensor, "B L"] | None = None,
        inputs_embeds: Float[Tensor, "B L D"] | None = None,
        video: Float[Tensor, "B Lv D"] | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "3 B L"] | None = None,
        cross_attention_mask: Bool[Tensor, "B L Lv"] | None = None,
        encoder_position_ids: Int[Tensor, "3 B Lv"] | None = None,
        encoder_seq_lens: Tensor | Lengths | None = None,
        labels: Int[Tensor, "B L"] | None = None,
        cache: VambaCache | None = None,
        use_cache: bool = False,
    ) -> VambaOutput:
        """Return logits (B, L, vocab_size), the loss if there are labels, and the cache if asked for.

        `video` are merged vision tokens; None is a text without a video, whose cross-attention is 0. `encoder_seq_lens` are
        the lengths of the videos of each row, (B, S) with trailing zeros or B lists; the rest of a row is padding. The samples
        of a packed row begin at position 0: they read no other sample, and each the video of its number, or the only one of
        the row. Mixers start anew with every video. A `cross_attention_mask` (True: may read) holds besides.

        `attention_mask` (B, M) is 0 at padding, left or right, or says itself which pairs count, (B, 1, L, M); M counts the
        cached tokens too. Positions default to the number of tokens before, 1 at padding. What padding gives is undefined.
        With a `cache` that holds a video, `video` and its lengths are not given again; a video of one row serves a batch of
        texts. `labels` are -100 where nothing is learnt.

        Raises TypeError or ValueError for what does not fit, before any layer runs.
        """
        check_kinds(
            cache, input_ids=input_ids, inputs_embeds=inputs_embeds, video=video, position_ids=position_ids, labels=labels,
            cross_attention_mask=cross_attention_mask, encoder_position_ids=encoder_position_ids,
        )  # fmt: skip
        text = self._embed(input_ids, inputs_embeds)
        if cache is not None:
            if video is not None and cache.video_keys:
                raise ValueError("video is given, and the cache holds one; allowed: one of them, text reads the cached video")
            if not cache.keys and cache.video_keys:
                cache = cache.of_rows(len(text))
            cache.check(len(self.model.layers), self.config.num_key_value_heads, self.config.channels, len(text), text.device)
        self._check_shapes(text, video, position_ids, encoder_position_ids, labels)
        valid, mask = read_attention_mask(attention_mask, text, self._cached_valid(cache))
        (B, L), past = text.shape[:2], 0 if cache is None else cache.text_length
        is_plain = position_ids is None and valid is None  # each row is one sample, without a look at the positions
        if position_ids is None:
            some = torch.ones(B, past + L, dtype=torch.bool, device=text.device) if valid is None else valid
            position_ids = default_positions(some[:, past:], some[:, :past].sum(1))

        lengths = self._lengths(encoder_seq_lens, video, cache)
        tokens = video.shape[1] if video is not None else 0 if cache is None else cache.video_length
        samples: list[list[slice]] = [[slice(0, L)]] * B
        if not past and not is_plain:
            samples = text_spans(position_ids, valid)
        packed = any(len(row) > 1 for row in samples) or any(len(row) > 1 for row in lengths or ())
        if use_cache and packed:
            raise ValueError("a row holds several samples or videos; allowed with use_cache: one, whose text goes on")
        if mask is not None:
            text_pattern = Pattern(mask=mask)
        elif past:
            text_pattern = continued_pattern(L, past + L, valid, text.device)
        else:
            text_pattern = causal_pattern(samples, L, valid)
        shared = Shared(
            backends.choose(self.backend, text.device),
            self.first_layer.angles(position_ids, text.dtype),
            None if encoder_position_ids is None else self.first_layer.angles(encoder_position_ids, text.dtype),
            text_pattern,
            self._cross_pattern(cross_attention_mask, samples, lengths, (B, L, tokens)),
            None if video is None or lengths is None else video_segments(lengths, tokens, text.device),
        )
        memories = self._memories(cache)
        hidden = self.run_layers(text, video, shared, memories, self.recompute_layers and not use_cache)
        logits = self.lm_head(self.model.norm(hidden, shared.backend))
        loss = None if labels is None else next_token_loss(logits, labels)
        return VambaOutput(logits, loss, self._collect(memories, lengths, valid, B, past + L) if use_cache else None)

    @property
    def first_layer(self) -> VambaDecoderLayer:
        """The layer whose rotary angles are those of all."""
        layer = self.model.layers[0]
        assert isinstance(layer, VambaDecoderLayer)
        return layer

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Float[Tensor, "B L D"]:
        """Return the embedded text. Raises ValueError unless exactly one is given, in its shape."""
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"input_ids and inputs_embeds: {given} given; allowed: one of them")
        D = self.config.hidden_size
        if inputs_embeds is not None:
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != D:
                raise ValueError(f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; allowed: (B, L, {D})")
            return inputs_embeds
        assert input_ids is not None
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; allowed: (B, L)")
        return self.model.embed_tokens(input_ids)

    def _check_shapes(
        self, text: Tensor, video: Tensor | None, position_ids: Tensor | None, video_positions: Tensor | None,
        labels: Tensor | None,
    ) -> None:  # fmt: skip
        """Raise ValueError for shapes and devices that do not fit the text."""
        B, L, D = text.shape
        if video is not None:
            if video.dim() != 3 or video.shape[0] != B or video.shape[2] != D:
                raise ValueError(f"video has shape {tuple(video.shape)}; allowed: ({B}, Lv, {D}), a row for each row of text")
            if video.device != text.device:
                raise ValueError(f"video is on {video.device}; allowed: {text.device}, where the text is")
            if self.config.cross_attn_use_position_embeddings and video_positions is None:
                raise ValueError(NO_POSITIONS)
        tokens = 0 if video is None else video.shape[1]
        for name, value, due in (
            ("position_ids", position_ids, (3, B, L)),
            ("encoder_position_ids", video_positions, (3, B, tokens)),
            ("labels", labels, (B, L)),
        ):
            if value is not None and tuple(value.shape) != due:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; allowed: {due}")

    @staticmethod
    def _cached_valid(cache: VambaCache | None) -> Tensor | None:
        """Return which cached text tokens are no padding (B, P), None without a cached text."""
        if cache is None or not cache.keys:
            return None
        if cache.valid is not None:
            return cache.valid
        return torch.ones(cache.batch_size, cache.text_length, dtype=torch.bool, device=cache.keys[0].device)

    @staticmethod
    def _lengths(
        given: Tensor | Lengths | None, video: Tensor | None, cache: VambaCache | None
    ) -> list[list[int]] | None:
        """Return the lengths of each row's videos, None where a video fills its row."""
        if given is not None:
            if video is None:
                raise ValueError("encoder_seq_lens is given without a video, whose tokens it counts")
            return row_lengths(given, len(video), video.shape[1])
        if cache is not None and cache.video_lengths is not None:
            return [[n] for n in cache.video_lengths]
        return None

    @staticmethod
    def _cross_pattern(
        given: Tensor | None, samples: list[list[slice]], lengths: list[list[int]] | None, sizes: tuple[int, int, int]
    ) -> Pattern:
        """Return who reads which video tokens; `sizes` are (B, L, Lv). Raises ValueError for a mask of another shape."""
        pattern = cross_pattern(samples, lengths, *sizes[1:])
        if given is None:
            return pattern
        if tuple(given.shape) != sizes:
            raise ValueError(f"cross_attention_mask has shape {tuple(given.shape)}; allowed: (B, L, Lv) = {sizes}")
        if pattern.spans is not None:
            spanned = torch.zeros_like(given)
            for row, queries, keys in pattern.spans:
                spanned[row, queries, keys] = True
            given = given & spanned
        return Pattern(mask=given[:, None])

    def _memories(self, cache: VambaCache | None) -> list[LayerMemory]:
        """Return a memory for each layer, with what the cache holds of it."""
        if cache is None:
            return [LayerMemory() for _ in self.model.layers]
        count = len(self.model.layers)
        video = layer_pairs(cache.video_keys, cache.video_values, count)
        text = layer_pairs(cache.keys, cache.values, count)
        return [LayerMemory(v, t) for v, t in zip(video, text, strict=True)]

    def run_layers(
        self, text: Tensor, video: Tensor | None, shared: Shared, memories: list[LayerMemory], recompute: bool
    ) -> Float[Tensor, "B L D"]:
        """Return the text stream after all layers; with `recompute` a backward runs each layer again."""
        last = len(self.model.layers) - 1
        for i, (layer, memory) in enumerate(zip(self.model.layers, memories, strict=True)):

            def run(
                text: Tensor, video: Tensor | None, layer: nn.Module = layer, memory: LayerMemory = memory, i: int = i
            ) -> tuple[Tensor, Tensor | None]:
                copied = LayerMemory(memory.video, memory.text) if recompute else memory  # a second run adds nothing twice
                return layer(text, video, shared=shared, memory=copied, run_mixer=i < last)

            if recompute and torch.is_grad_enabled():
                text, video = checkpoint(run, text, video, use_reentrant=False)
            else:
                text, video = run(text, video)
        return text

    @staticmethod
    def _collect(
        memories: list[LayerMemory], lengths: list[list[int]] | None, valid: Tensor | None, rows: int, length: int
    ) -> VambaCache:
        """Return the cache of what the layers' memories hold after a call."""
        (video_keys, video_values), (keys, values) = (
            tuple(tuple(pair[i] for pair in pairs if pair is not None) for i in (0, 1))
            for pairs in ([m.video for m in memories], [m.text for m in memories])
        )
        if valid is None:
            valid = torch.ones(rows, length, dtype=torch.bool, device=keys[0].device)
        counts = None if lengths is None else tuple(row[0] for row in lengths)
        return VambaCache(video_keys, video_values, counts, keys, values, valid)
