"""Answers token by token: greedy or sampled, by steps that on a GPU are replays of a CUDA graph."""

import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fused import backends
from fused.models.vamba.cache import SlotMemory, VambaCache, layer_pairs
from fused.models.vamba.config import VambaConfig
from fused.models.vamba.layer import Shared
from fused.models.vamba.pattern import Pattern, cross_pattern
from fused.rules import check_integer, check_number
from fused.runtime.graphs import CudaRecorder, warm

GRAPH_FROM = 8  # new tokens; recording a graph takes as long as a few steps
SLOTS = 16  # the size of a memory is a multiple of it: PyTorch's kernels copy a mask whose rows do not lie so

_log = logging.getLogger("fused")


class Generates:
    """`generate` and `stream` of a `Vamba`."""

    config: VambaConfig
    backend: str
    stop_tokens: tuple[int, ...]
    model: Any
    lm_head: Any

    def generate(self, video: VambaCache | Tensor | None, input_ids: Int[Tensor, "B L"], **options: Any) -> Int[Tensor, "B n"]:
        """Return the new tokens of each row, at most `max_new_tokens`; a row that stopped repeats its stop token.

        Arguments and errors are those of `stream`.

            >>> video = model.encode_video(features)
            >>> answer = model.generate(video, question_ids, max_new_tokens=64)
        """
        found = list(self.stream(video, input_ids, **options))
        return torch.stack(found, dim=1) if found else input_ids.new_zeros(len(input_ids), 0)

    @torch.no_grad()
    def stream(
        self,
        video: VambaCache | Tensor | None,
        input_ids: Int[Tensor, "B L"],
        *,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 512,
        temperature: int | float = 0.0,
        top_p: int | float = 1.0,
        stop_tokens: Collection[int] | None = None,
        generator: torch.Generator | None = None,
        cuda_graph: bool = True,
    ) -> Iterator[Int[Tensor, " B"]]:
        """Yield the next token of each row, until all have stopped or `max_new_tokens` are out.

        `video` is what `encode_video` returned, merged vision tokens, or None; one video serves all rows. A cache with text
        goes on from it. `attention_mask` (B, M) is 0 at padding; M counts cached text too. `temperature` 0 takes the likeliest
        token; above, one is drawn among the likeliest that together have the probability `top_p`, from `generator`. A row ends
        with a token of `stop_tokens` (None: the model's). `cuda_graph` replays each step as a CUDA graph where it can.

        Raises what `forward` raises, and TypeError or ValueError for options out of range.
        """
        check_sampling("generate", max_new_tokens, temperature, top_p)
        stops = frozenset(self.stop_tokens if stop_tokens is None else stop_tokens)
        cache = self.encode_video(video) if isinstance(video, Tensor) else video  # type: ignore[attr-defined]
        out = self(input_ids, cache=cache, attention_mask=attention_mask, use_cache=True)  # type: ignore[operator]
        after: VambaCache = out.cache
        new = after.valid[:, -input_ids.shape[1] :]  # type: ignore[index]
        last = (new * torch.arange(1, new.shape[1] + 1, device=new.device)).argmax(1)
        logits = out.logits[torch.arange(len(last), device=new.device), last]
        stopped: list[int | None] = [None] * len(logits)
        step: DecodeStep | None = None
        for count in range(max_new_tokens):
            token = pick(logits, temperature, top_p, generator)
            if stops:
                found = token.tolist()
                if any(s is not None for s in stopped):
                    found = [t if s is None else s for t, s in zip(found, stopped, strict=True)]
                    token = torch.tensor(found, device=token.device)
                stopped = [t if t in stops else None for t in found]
            yield token
            if count + 1 == max_new_tokens or all(s is not None for s in stopped):
                return
            if step is None:
                graph = cuda_graph and max_new_tokens >= GRAPH_FROM
                step = DecodeStep(self, after, max_new_tokens, graph)
            logits = step(token)


class DecodeStep:
    """The forward of one token a row, over keys and values in memory of a fixed size."""

    def __init__(self, model: Any, cache: VambaCache, room: int, graph: bool) -> None:
        self.model, device = model, cache.keys[0].device
        assert cache.valid is not None
        B, L = cache.valid.shape
        self.token = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.positions = cache.valid.sum(1)[None, :, None].repeat(3, 1, 1)
        self.slot = torch.full((1,), L, device=device)
        dtype, size = cache.keys[0].dtype, -(-(L + room) // SLOTS) * SLOTS
        self.mask = torch.full((B, 1, 1, size), -torch.inf, dtype=dtype, device=device)
        self.mask[..., :L].masked_fill_(cache.valid[:, None, None], 0)
        video = layer_pairs(cache.video_keys, cache.video_values, len(cache.keys))
        text = zip(cache.keys, cache.values, strict=True)
        self.memories = [SlotMemory(v, t, size, self.slot) for v, t in zip(video, text, strict=True)]
        self.backend = backends.choose(model.backend, device)
        lengths = None if cache.video_lengths is None else [[n] for n in cache.video_lengths]
        self.cross = cross_pattern([[slice(0, 1)]] * B, lengths, 1, cache.video_length)
        on_device = all(t.device == device for t in cache.video_keys)
        self.work: Callable[[], Tensor] = self._forward
        if graph and device.type == "cuda" and on_device:
            self._record(device)

    def __call__(self, token: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Return the logits after one more token of each row; the next call writes into them."""
        self.token.copy_(token[:, None])
        logits = self.work()
        self.slot += 1
        self.positions += 1
        return logits

    def _forward(self) -> Float[Tensor, "B V"]:
        """Return the logits after the token; doing it again changes nothing."""
        decoder, layers = self.model.model, self.model.model.layers
        self.mask.index_fill_(3, self.slot, 0)
        text = decoder.embed_tokens(self.token)
        angles = layers[0].angles(self.positions, text.dtype)
        shared = Shared(self.backend, angles, None, Pattern(mask=self.mask), self.cross, None)
        for layer, memory in zip(layers, self.memories, strict=True):
            text, _ = layer(text, None, shared=shared, memory=memory)
        return self.model.lm_head(decoder.norm(text, self.backend))[:, -1]

    def _record(self, device: torch.device) -> None:
        """Record the forward as a CUDA graph, or log why it cannot be."""
        recorder = CudaRecorder(device)
        try:
            warm(recorder, self._forward)
            recording = recorder.record(self._forward)
        except RuntimeError as error:
            _log.warning("generate runs without a CUDA graph: %s", error)
            return

        def replay() -> Tensor:
            recording.replay()
            return recording.output

        self.work = replay


def pick(
    logits: Float[Tensor, "B V"], temperature: int | float, top_p: int | float, generator: torch.Generator | None
) -> Int[Tensor, " B"]:
    """Return a token of each row: the likeliest, or with a temperature one drawn among those that `top_p` leaves."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, places = probabilities.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)  # before it, the others have top_p already
        drawn = torch.multinomial(ordered, 1, generator=generator)
        return places.gather(-1, drawn)[:, 0]
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def check_sampling(op: str, max_new_tokens: object, temperature: object, top_p: object) -> None:
    """Raise TypeError or ValueError for options of an answer that are out of range; `op` is the function that takes them."""
    check_integer(op, "max_new_tokens", max_new_tokens, 1)
    check_number(op, "temperature", temperature, 0, float("inf"), "[)")
    check_number(op, "top_p", top_p, 0, 1, "(]")
