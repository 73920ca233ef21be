"""Vamba: a decoder whose text reads a video, and whose video passes Mamba-2 mixers."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reference.models.vamba.cache import VambaCache
from reference.models.vamba.config import VambaConfig
from reference.models.vamba.layer import LayerInputs, VambaDecoderLayer
from reference.models.vamba.loss import next_token_loss
from reference.models.vamba.masks import (
    Lengths,
    causal_mask,
    cross_mask,
    default_positions,
    read_attention_mask,
    row_lengths,
    text_samples,
    video_segments,
)  # fmt: skip
from reference.modules.norm import Norm


class VambaOutput(NamedTuple):
    """The outputs of a `Vamba`."""

    logits: Tensor  # (B, L, vocab_size)
    loss: Tensor | None = None  # with labels
    cache: VambaCache | None = None  # with use_cache


class Decoder(nn.Module):
    """The embedding, the layers and the final norm: upstream's `model.*`."""

    def __init__(self, config: VambaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(VambaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)


class Vamba(nn.Module):
    """A language model over text and the merged tokens of a vision tower; keys are upstream's without `visual.*`.

    The text holds no place for video tokens. Video tokens read no text, so that keys and values of a video serve any question.
    The last layer's mixer has no effect and no gradient; its weights are kept because checkpoints have them.
    """

    def __init__(self, config: VambaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

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

        `video` are merged vision tokens; None is a text without a video. `encoder_seq_lens` are the lengths of the videos of
        each row, (B, S) with trailing zeros or B lists; the rest of a row is padding. The samples of a packed row begin at
        position 0: they read no other sample, and each the video of its number, or the only one of the row. Mixers start anew
        with every video. A `cross_attention_mask` (True: may read) holds besides.

        `attention_mask` (B, M) is 0 at padding, left or right, or says itself which pairs count, (B, 1, L, M); M counts the
        cached tokens too. Positions default to the number of tokens before, 1 at padding. What padding gives is undefined.
        With a `cache` that holds a video, `video` and its lengths are not given again. `labels` are -100 where nothing is
        learnt.

        Raise TypeError or ValueError for what does not fit.
        """
        text = self.embed(input_ids, inputs_embeds)
        B, L = text.shape[:2]
        if cache is not None:
            cache.check(len(self.model.layers), self.config.num_key_value_heads, self.config.channels, B, text.device)
            if video is not None and cache.video_keys:
                raise ValueError("video is given, and the cache holds one; a text reads the cached video: leave video out")
        self.check(text, video, position_ids, encoder_position_ids, labels)
        past = 0 if cache is None else cache.text_length
        cached = None
        if cache is not None and past:
            cached = cache.valid if cache.valid is not None else text.new_ones(B, past, dtype=torch.bool)
        valid, self_mask = read_attention_mask(attention_mask, text, cached)
        if position_ids is None:
            position_ids = default_positions(valid[:, past:], valid[:, :past].sum(1))
        samples = text_samples(position_ids, valid[:, past:])
        if (use_cache or past) and bool((samples > 0).any()):
            raise ValueError("position_ids have several samples in a row; allowed with a cache: one, whose text goes on")
        if self_mask is None:
            self_mask = causal_mask(samples, valid)

        lengths: list[list[int]] | None = None
        if encoder_seq_lens is not None:
            if video is None:
                raise ValueError("encoder_seq_lens is given without a video, whose tokens it counts")
            lengths = row_lengths(encoder_seq_lens, B, video.shape[1])
            if use_cache and any(len(row) > 1 for row in lengths):
                raise ValueError("encoder_seq_lens has several videos in a row; allowed with a cache: one")
        elif cache is not None and cache.video_keys and cache.video_lengths is not None:
            lengths = [[n] for n in cache.video_lengths]
        read, seq_idx = self.read_mask(cross_attention_mask, samples, lengths, video, cache)
        layer: VambaDecoderLayer = self.model.layers[0]  # type: ignore[assignment]
        inputs = LayerInputs(
            layer.angles(position_ids),
            None if encoder_position_ids is None else layer.angles(encoder_position_ids),
            self_mask, read, seq_idx,
        )  # fmt: skip
        hidden, video_pairs, pairs = self.run_layers(text, video, inputs, cache)
        logits = self.lm_head(self.model.norm(hidden))
        loss = None if labels is None else next_token_loss(logits, labels)
        if not use_cache:
            return VambaOutput(logits, loss)
        counts = None if lengths is None else tuple(row[0] for row in lengths)
        video_keys, video_values = (tuple(pair[i] for pair in video_pairs if pair is not None) for i in (0, 1))
        keys, values = (tuple(pair[i] for pair in pairs) for i in (0, 1))
        return VambaOutput(logits, loss, VambaCache(video_keys, video_values, counts, keys, values, valid))

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Float[Tensor, "B L D"]:
        """Return the embedded text. Raise ValueError unless one of both is given, in its shape; TypeError for other dtypes."""
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"input_ids and inputs_embeds: {given} given; allowed: one of them")
        if input_ids is None:
            assert inputs_embeds is not None
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.config.hidden_size:
                due = f"(B, L, {self.config.hidden_size})"
                raise ValueError(f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; allowed: {due}")
            return inputs_embeds
        if input_ids.is_floating_point():
            raise TypeError(f"input_ids is {input_ids.dtype}; allowed: integers")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; allowed: (B, L)")
        return self.model.embed_tokens(input_ids)

    def check(
        self, text: Tensor, video: Tensor | None, position_ids: Tensor | None, video_positions: Tensor | None,
        labels: Tensor | None,
    ) -> None:  # fmt: skip
        """Raise ValueError for shapes and devices that do not fit the text."""
        B, L, D = text.shape
        if video is not None and (video.dim() != 3 or video.shape[0] != B or video.shape[2] != D):
            raise ValueError(f"video has shape {tuple(video.shape)}; allowed: ({B}, Lv, {D}), a row for each row of text")
        tokens = 0 if video is None else video.shape[1]
        for name, value, due in (
            ("position_ids", position_ids, (3, B, L)),
            ("encoder_position_ids", video_positions, (3, B, tokens)),
            ("labels", labels, (B, L)),
        ):
            if value is not None and tuple(value.shape) != due:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; allowed: {due}")

    def read_mask(
        self, given: Tensor | None, samples: Tensor, lengths: list[list[int]] | None, video: Tensor | None,
        cache: VambaCache | None,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Return which video tokens each text token may read (B, L, Lv), None for all, and the mixers' seq_idx (B, Lv).

        Raise TypeError or ValueError for a mask that does not fit.
        """
        tokens = video.shape[1] if video is not None else cache.video_keys[0].shape[2] if cache and cache.video_keys else None
        if given is not None:
            if given.dtype != torch.bool:
                raise TypeError(f"cross_attention_mask is {given.dtype}; allowed: bool, True where a text token may read")
            due = (*samples.shape, tokens)
            if tuple(given.shape) != due:
                raise ValueError(f"cross_attention_mask has shape {tuple(given.shape)}; allowed: (B, L, Lv) = {due}")
        if lengths is None or tokens is None:
            return given, None
        segments = video_segments(lengths, tokens, samples.device)
        mask = cross_mask(samples, segments, lengths)
        return mask if given is None else mask & given, segments

    def run_layers(
        self, text: Tensor, video: Tensor | None, inputs: LayerInputs, cache: VambaCache | None
    ) -> tuple[Tensor, list, list]:
        """Return the last text stream (B, L, D), and of each layer (keys, values) of the video, or None, and of the text."""
        video_pairs, pairs = [], []
        for i, layer in enumerate(self.model.layers):
            assert isinstance(layer, VambaDecoderLayer)
            if cache is not None and cache.video_keys:
                video_pair: tuple[Tensor, Tensor] | None = (cache.video_keys[i], cache.video_values[i])
            else:
                video, video_pair = layer.project_video(video, inputs)
            past = (cache.keys[i], cache.values[i]) if cache is not None and cache.keys else None
            text, pair = layer.update_text(text, video_pair, inputs, past)
            if video is not None and i + 1 < len(self.model.layers):
                video = layer.vision_mixer(video, inputs.seq_idx)
            video_pairs.append(video_pair)
            pairs.append(pair)
        return text, video_pairs, pairs
