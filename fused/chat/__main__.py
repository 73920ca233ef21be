"""python -m fused.chat --model FOLDER --video FILE --question TEXT [--question TEXT ...] [--frames N]

The folder is that of a Vamba or of a BIMBA, which --base-model completes. Answers are printed as they come. Without
--question, questions are read line by line. Exit codes: 0 done, 2 a wrong option, folder or video, 130 interrupted.
"""

import argparse
import io
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fused.chat.bimba import BimbaConversation
from fused.chat.session import Conversation
from fused.models.bimba.load import is_bimba
from fused.models.vamba.generate import check_sampling
from fused.terminal import DONE, INTERRUPTED, USAGE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer as the command line says (None: sys.argv), and return the exit code."""
    options = parser().parse_args(arguments)
    try:
        device = choose_device(options.device)
        dtype = DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
        check_sampling("ask", options.max_new_tokens, options.temperature, options.top_p)
        talk = open_conversation(options, device, dtype)
        if options.video:
            start = time.perf_counter()
            video = talk.watch(options.video, **watch_options(options, talk))
            spent = time.perf_counter() - start
            kept = memory(device, video.nbytes, talk.KEEPS)
            note(f"{options.video}: {video.video_length} video tokens in {spent:.1f} s; {kept}")
        for question in options.question or questions():
            answer(talk, question, options, device)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"fused.chat: {error}", file=sys.stderr)
        return USAGE
    return DONE


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    words = argparse.ArgumentParser(prog="python -m fused.chat", description="Ask a Vamba or a BIMBA about a video.")
    words.add_argument("--model", required=True, metavar="FOLDER", help="config.json, weights in safetensors, tokenizer.json")
    words.add_argument("--base-model", metavar="FOLDER", help="of a BIMBA whose folder holds adapters; default: the named one")
    words.add_argument("--video", metavar="FILE", help="a video file, or a folder of images; without it text only")
    words.add_argument("--question", action="append", metavar="TEXT", help="may be given several times; default: read lines")
    words.add_argument("--frames", type=int, metavar="N", help="that are read: 128 by a Vamba, 64 by a BIMBA")
    words.add_argument("--longest", type=int, metavar="PIXELS", help="longest side of a Vamba's frame (640)")
    words.add_argument("--times", action="store_true", help="tell a BIMBA the times of the frames, as its training did")
    words.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (512)")
    words.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    words.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest with probability P (1)")
    words.add_argument("--offload", action="store_true", help="keep a Vamba's keys and values of the video in host memory")
    words.add_argument("--device", metavar="NAME", help="cuda if there is one, else cpu")
    words.add_argument("--dtype", choices=DTYPES, help="of the weights: bfloat16 on a GPU, else float32")
    words.add_argument("--backend", default="auto", metavar="NAME", help="see fused.backends (auto)")
    return words


def choose_device(name: str | None) -> torch.device:
    """Return the device of a name, without one a GPU if there is one. Raises ValueError for one that is not here."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name!r}, and PyTorch finds no GPU; allowed here: cpu")
    return device


def open_conversation(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> Conversation | BimbaConversation:
    """Return the conversation with the model of the folder. Raises ValueError for a base model of what is no BIMBA."""
    given: dict[str, Any] = {"device": device, "dtype": dtype, "backend": options.backend}
    if is_bimba(options.model):
        return BimbaConversation.open(options.model, base_model=options.base_model, **given)
    if options.base_model:
        raise ValueError(f"--base-model is {options.base_model!r}, but {options.model} is no BIMBA; only a BIMBA may need one")
    return Conversation.open(options.model, **given)


def watch_options(options: argparse.Namespace, talk: Conversation | BimbaConversation) -> dict[str, Any]:
    """Return the given options of `watch`. Raises ValueError for one that the model does not have."""
    values = {"frames": options.frames, "longest": options.longest, "offload": options.offload or None}
    values["times"] = options.times or None
    given = {name: value for name, value in values.items() if value is not None}
    for name in given:
        if name not in talk.WATCHES:
            other = "BIMBA" if name == "times" else "Vamba"
            raise ValueError(f"--{name} is an option of a {other}; of {options.model}, allowed: --{', --'.join(talk.WATCHES)}")
    return given


def questions() -> Iterable[str]:
    """Yield the questions that are typed, a line each, until the end of the input; what is no text shows as \ufffd."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


def answer(talk: Conversation | BimbaConversation, question: str, options: argparse.Namespace, device: torch.device) -> None:
    """Print the answer to a question as it comes, and its speed."""
    start, pieces, first = time.perf_counter(), 0, 0.0
    sampling = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "top_p": options.top_p}
    for piece in talk.ask(question, **sampling):
        print(piece, end="", flush=True)
        pieces += 1
        first = first or time.perf_counter()
    print(flush=True)
    end = time.perf_counter()
    speed = f"{(pieces - 1) / (end - first):.1f} a second" if pieces > 1 else "no more"
    note(f"the first token after {(first or end) - start:.2f} s, then {speed}; {memory(device)}")


def memory(device: torch.device, kept: int = 0, name: str = "") -> str:
    """Return the memory in use in words; `kept` are bytes of a video."""
    words = f"{name} {kept / 2**30:.2f} GiB" if kept else ""
    if device.type != "cuda":
        return words or "memory is not counted on a CPU"
    peak = f"peak {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    return f"{words}, {peak}" if words else peak


def note(text: str) -> None:
    """Print a remark beside the answers."""
    print(f"[{text}]", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
