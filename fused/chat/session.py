"""A model, its tokenizer, and one video that is read once for any number of questions."""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from fused.io.repeated_frames import RepeatedFrames, middle_places
from fused.models.conversation.tokenizer import end_tokens, read_tokenizer, require_transformers
from fused.models.conversation.turns import Turn, chat_text
from fused.models.vamba.cache import VambaCache
from fused.models.vamba.config import VambaConfig
from fused.models.vamba.model import Vamba
from fused.models.vamba.prefill import CHUNK
from fused.models.vamba.vision import SIDE, VIDEO_WORDS, frame_size, prepare_frame
from fused.rules import check_integer
from fused.runtime.memory import free_bytes

FRAMES_AT_ONCE = 32  # that are decoded before they pass the vision tower
UNFINISHED = "\ufffd"  # what a tokenizer shows for a character of which a token is missing


class Conversation:
    """Questions about videos. Each question stands by itself: no answer is read by the next one.

        >>> talk = Conversation.open("vamba-7b", device="cuda")
        >>> talk.watch("film.mp4", frames=512)
        >>> print("".join(talk.ask("Who enters the room?")))
    """

    WATCHES = ("frames", "longest", "offload")  # options of `watch` that the command knows
    KEEPS = "keys and values"  # of a video

    def __init__(self, model: Vamba, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.video: VambaCache | None = None
        self.device = model.model.embed_tokens.weight.device

    @classmethod
    def open(
        cls, folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, backend: str = "auto"
    ) -> "Conversation":
        """Return the conversation with the model of a folder that also holds a tokenizer and a vision tower.

        Raises what `Vamba.from_pretrained` raises, and ImportError without transformers.
        """
        require_transformers()
        Vamba.outline(folder, vision=True)  # this and the tokenizer first, since weights take longer
        tokenizer = read_tokenizer(folder)
        return cls(Vamba.from_pretrained(folder, vision=True, device=device, dtype=dtype, backend=backend), tokenizer)

    def watch(
        self, path: str | Path, *, frames: int = 128, longest: int | None = 640, chunk: int = CHUNK, offload: bool = False
    ) -> VambaCache:
        """Read a video file in place of the one before, and return its cache.

        `frames` are the middles of equal parts of the video; a shorter one repeats its last frame. A frame with a side above
        `longest` pixels is scaled to it, see `vision.frame_size`. `chunk` and `offload` are those of `encode_video`.

        Raises VideoError for a file that cannot be read; ValueError for frames that need more memory than is free, before any
        passes the model; TypeError or ValueError for options out of range.
        """
        check_integer("watch", "frames", frames, 2)
        if longest is not None:
            check_integer("watch", "longest", longest, SIDE)
        self.video = None  # frees its memory
        self._check_memory(frames, frame_size(1, 1), offload)  # of the smallest frames, before any is decoded
        self.video = self.model.encode_video(self._frames(Path(path), frames, longest, offload), chunk=chunk, offload=offload)
        return self.video

    def ask(
        self, question: str, *, max_new_tokens: int = 512, temperature: int | float = 0.0, top_p: int | float = 1.0
    ) -> Iterator[str]:
        """Return an iterator over the answer to a question, piece by piece; options are those of `Vamba.stream`."""
        prompt = chat_text(self.tokenizer, [Turn("user", VIDEO_WORDS + question)], answer_follows=True)
        ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        stops = {*self.model.stop_tokens, *end_tokens(self.tokenizer)}
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        tokens = self.model.stream(self.video, ids.to(self.device), stop_tokens=stops, **options)
        return pieces(self.tokenizer, (int(token[0]) for token in tokens), stops)

    def _frames(self, path: Path, frames: int, longest: int | None, offload: bool) -> Iterator[UInt8[Tensor, "n 3 H W"]]:
        """Yield the prepared frames in parts; at the first, check the memory."""
        waiting: list[Tensor] = []
        size: tuple[int, int] | None = None
        for image, times in RepeatedFrames(path, frames, middle_places):
            if size is None:
                size = frame_size(image.shape[0], image.shape[1], longest)
                self._check_memory(frames, size, offload)
            waiting += [prepare_frame(image, size)] * times
            if len(waiting) >= FRAMES_AT_ONCE:
                yield torch.stack(waiting)
                waiting.clear()
        if waiting:
            yield torch.stack(waiting)

    def _check_memory(self, frames: int, size: tuple[int, int], offload: bool) -> None:
        """Raise ValueError if keys and values of the video tokens, and one chunk, do not fit into the free memory."""
        tokens = frames // 2 * (size[0] // SIDE) * (size[1] // SIDE)
        dtype = self.model.model.embed_tokens.weight.dtype
        cached, scratch = video_bytes(self.model.config, tokens, dtype)
        for device, needed in ((self.device, scratch + (0 if offload else cached)), (torch.device("cpu"), cached * offload)):
            free = free_bytes(device)
            if free is not None and needed > free:
                gib = 2**30
                raise ValueError(
                    f"{frames} frames are {tokens} video tokens, which need {needed / gib:.1f} GiB on {device}, where "
                    f"{free / gib:.1f} GiB are free; allowed: about {max(int(frames * free / needed), 0)} frames, smaller "
                    "ones (longest), or keys and values in host memory (offload)"
                )


def pieces(tokenizer: Any, tokens: Iterable[int], stops: Collection[int]) -> Iterator[str]:
    """Yield the text of tokens as they come, up to one of `stops`; a character of several tokens comes whole."""
    read: list[int] = []
    shown = ""
    for token in tokens:
        if token in stops:
            break
        read.append(token)
        text = tokenizer.decode(read)
        if not text.endswith(UNFINISHED):
            yield text[len(shown) :]
            shown = text
    if read and (rest := tokenizer.decode(read)[len(shown) :]):
        yield rest


def video_bytes(config: VambaConfig, tokens: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of keys and values of a video, and of one chunk on its way through a layer, about."""
    size = dtype.itemsize
    widest = config.hidden_size * (2 * int(config.mixer.get("expand", 2)) + 1)
    return config.cached_values * tokens * size, 3 * widest * min(tokens, CHUNK) * size
