"""A BIMBA, its tokenizer, and one video that is compressed once for any number of questions."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fused.chat.session import pieces
from fused.io.repeated_frames import RepeatedFrames, even_places
from fused.models.bimba.load import base_folder
from fused.models.bimba.model import FRAMES_AT_ONCE, Bimba, video_token_count
from fused.models.conversation.tokenizer import end_tokens, read_tokenizer, require_transformers
from fused.models.vamba.generate import check_sampling, pick
from fused.rules import check_integer


@dataclass(frozen=True)
class CompressedVideo:
    """The video tokens (V, C) that the language model reads, and the times of its frames if questions are to tell them."""

    tokens: Tensor
    seconds: list[float] | None = None
    duration: float | None = None

    @property
    def video_length(self) -> int:
        """Return V."""
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tokens."""
        return self.tokens.nbytes


class BimbaConversation:
    """Questions about videos. Each question stands by itself: no answer is read by the next one.

        >>> talk = BimbaConversation.open("bimba-adapters", base_model="llava-video-7b", device="cuda")
        >>> talk.watch("film.mp4", frames=64)
        >>> print("".join(talk.ask("Who enters the room?")))
    """

    WATCHES = ("frames", "times")  # options of `watch` that the command knows
    KEEPS = "compressed tokens"  # of a video

    def __init__(self, model: Bimba, tokenizer: object) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.video: CompressedVideo | None = None

    @classmethod
    def open(
        cls, folder: str | Path, *, base_model: str | Path | None = None, device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None, backend: str = "auto",
    ) -> "BimbaConversation":  # fmt: skip
        """Return the conversation with the model of a folder; the tokenizer is that of the base model's folder.

        Raises what `Bimba.from_pretrained` raises, and OSError or ValueError without a tokenizer.
        """
        require_transformers()
        tokenizer = read_tokenizer(base_folder(folder, base_model))  # before the weights, which take longer
        model = Bimba.from_pretrained(folder, base_model=base_model, device=device, dtype=dtype, backend=backend)
        return cls(model, tokenizer)

    @torch.no_grad()
    def watch(self, path: str | Path, *, frames: int = 64, times: bool = False) -> CompressedVideo:
        """Read a video file in place of the one before, and return its compressed tokens.

        `frames` are spread evenly from the first frame to the last; a shorter video repeats some. With `times` questions begin
        with the instruction about their times that upstream trains with, and does not give in its evaluation.

        Raises VideoError for a file that cannot be read; TypeError or ValueError for `frames` below 1; ValueError, before any
        frame is read, for more than the language model has positions for; ValueError for `times` of a folder of images, which
        has none.
        """
        check_integer("watch", "frames", frames, 1)
        self._check_positions(frames)
        self.video = None  # frees its memory
        encoded: list[Tensor] = []
        waiting: list[Tensor] = []
        taken: list[int] = []
        found = RepeatedFrames(path, frames, even_places)
        if times and found.seconds is None:
            raise ValueError(f"times are to be told, and {path} is a folder of images, which has none; allowed: a video file")
        for image, count in found:
            taken.append(count)
            waiting.append(image)
            if len(waiting) == FRAMES_AT_ONCE:
                encoded.append(self._encode(waiting))
                waiting.clear()
        if waiting:
            encoded.append(self._encode(waiting))
        features = torch.cat(encoded)
        if sum(taken) > len(taken):  # a frame that is repeated passes the tower once
            features = features.repeat_interleave(torch.tensor(taken, device=features.device), dim=0)
        told = (found.seconds, found.duration) if times else (None, None)
        self.video = CompressedVideo(self.model.compress(features), *told)
        return self.video

    def ask(
        self, question: str, *, max_new_tokens: int = 512, temperature: int | float = 0.0, top_p: int | float = 1.0
    ) -> Iterator[str]:
        """Return an iterator over the answer to a question, piece by piece.

        `temperature` 0 takes the likeliest token; above, one is drawn among the likeliest that together have the probability
        `top_p`. Without a video the question alone is read.

        Raises TypeError or ValueError for options out of range, and ValueError for a prompt that is longer than the language
        model has positions for.
        """
        check_sampling("ask", max_new_tokens, temperature, top_p)
        told = (None, None) if self.video is None else (self.video.seconds, self.video.duration)
        ids = self.model.tokenize(self.tokenizer, question, *told)
        if self.video is None:
            ids = ids[:, ids[0] >= 0]
        length, most = ids.shape[1] + (0 if self.video is None else self.video.video_length - 1), self._positions
        if length > most:
            raise ValueError(f"the question and the video are {length} tokens; allowed: {most}, max_position_embeddings")
        ends = self.model.language_model.config.eos_token_id
        stops = {*end_tokens(self.tokenizer), *(ends if isinstance(ends, list) else [ends])}
        return pieces(self.tokenizer, self._tokens(ids, max_new_tokens, temperature, top_p), stops)

    @torch.no_grad()
    def _tokens(self, ids: Int[Tensor, "1 L"], count: int, temperature: int | float, top_p: int | float) -> Iterator[int]:
        """Yield the tokens that continue a prompt; keys and values are kept while they come."""
        model = self.model.language_model
        inputs, memory = self.model.embed(ids, None if self.video is None else self.video.tokens), None
        for _ in range(count):
            out = model(inputs_embeds=inputs, past_key_values=memory, use_cache=True, logits_to_keep=1)
            memory = out.past_key_values
            token = pick(out.logits[:, -1], temperature, top_p, None)
            yield int(token)
            inputs = model.get_input_embeddings()(token[:, None])

    @property
    def _positions(self) -> int:
        """The tokens that the language model was trained to read at once."""
        return self.model.language_model.config.max_position_embeddings

    def _check_positions(self, frames: int) -> None:
        """Raise ValueError for fewer frames than are pooled, and for more tokens than the language model has positions for."""
        config, rows, pooling, most = self.model.config, self.model.rows, self.model.temporal_pooling, self._positions
        if frames < pooling:
            raise ValueError(f"frames is {frames}; allowed: from {pooling} up, temporal_pooling in the model's config.json")
        if (count := video_token_count(config, frames, rows)) > most:
            allowed = most // video_token_count(config, pooling, rows) * pooling
            raise ValueError(f"frames is {frames}, {count} video tokens; allowed: {allowed}, by max_position_embeddings {most}")

    def _encode(self, images: list[Tensor]) -> Float[Tensor, "F rows columns C"]:
        """Return the features of frames (H, W, 3)."""
        return self.model.encode_frames(self.model.prepare_frames(torch.stack(images)))
