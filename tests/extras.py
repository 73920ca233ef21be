"""Runs what the pages show for one extra, in an environment that has this extra and nothing else: `nox -s extras`.

    python tests/extras.py train
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pages import ROOT, blocks_of

GUIDE = "fused/README.md"
SMALL = "data.frames=2 data.size=32 data.workers=0 model.depth=1 model.embed_dim=32 batch_size=4 epochs=1 device=cpu"


def run_python(page: str, extra: str | None = None) -> dict[str, Any]:
    """Run the Python blocks of a page that need no extra, and those marked with `extra`, in one namespace; return it."""
    namespace: dict[str, Any] = {"__name__": "page"}
    blocks = [b for b in blocks_of(page) if b.language == "python" and not b.not_run]
    last = max((i for i, b in enumerate(blocks) if extra and b.extra == extra), default=len(blocks) - 1)
    for block in blocks[: last + 1]:
        if block.extra in (None, extra):
            exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec"), namespace)
    return namespace


def run_command(line: str, *more: str) -> None:
    """Run a command line of a page, with more arguments. Its `python` is this one; what it would write to a file is dropped."""
    command, redirects, _ = line.partition(" #")[0].partition(" > ")
    program, *words = shlex.split(command)
    assert program == "python", line
    print(">", command.strip(), *more, flush=True)
    subprocess.run([sys.executable, *words, *more], check=True, stdout=subprocess.DEVNULL if redirects else None)


def base() -> None:
    """Run the front page, and the user guide as far as it needs no extra."""
    run_python("README.md")
    run_python(GUIDE)


def train() -> None:
    """Train on made videos with the guide's configuration, made small, by its commands; read a clip for the model."""
    from fused import VideoMamba
    from harness.fixtures.video import write

    [configuration] = [block for block in blocks_of(GUIDE) if block.language == "yaml"]
    Path("run.yaml").write_text(configuration.text)
    for part, count in (("train", 4), ("val", 1)):
        for name, grey in (("dark", 40), ("light", 200)):
            folder = Path("videos", part, name)
            folder.mkdir(parents=True)
            for i in range(count):
                write(folder / f"{i}.mp4", torch.full((12, 48, 64, 3), grey + i, dtype=torch.uint8))
    [shell] = [block for block in blocks_of(GUIDE) if ".[train]" in block.text]
    commands = [line for line in shell.text.splitlines() if line.startswith("python -m fused.train")]
    trained = []
    for line in commands:
        run_command(line, *SMALL.split(), "data.augment=rand-m7-n4-mstd0.5-inc1")
        if Path("runs/first/model").exists():
            trained.append(VideoMamba.from_pretrained("runs/first/model"))
        shutil.rmtree("runs", ignore_errors=True)  # the next line has another configuration
    assert len(commands) == 4 and len(trained) == 1  # the others print the configuration or recipes, or look at the data
    trained[0].save_pretrained("runs/first/model")
    assert run_python(GUIDE, "train")["clip"].shape == (3, 2, 32, 32)


def evaluate() -> None:
    """Test a small model, as the guide does, by its commands and in Python."""
    from fused import VideoMamba, VideoMambaConfig
    from harness.fixtures.video import write

    model = VideoMamba(VideoMambaConfig(depth=1, embed_dim=32, img_size=32, num_frames=2, num_classes=2))
    model.labels = ("dark", "light")
    model.save_pretrained("runs/first/model")
    for name, grey in (("dark", 40), ("light", 200)):
        Path("videos/val", name).mkdir(parents=True)
        write(Path("videos/val", name, "0.mp4"), torch.full((12, 48, 64, 3), grey, dtype=torch.uint8))
    [shell] = [block for block in blocks_of(GUIDE) if ".[evaluate]" in block.text]
    commands = [line for line in shell.text.splitlines() if line.startswith("python -m fused.")]
    for line in commands:
        run_command(line)
    assert len(commands) == 3 and Path("runs/first/test/confusion.png").exists() and Path("features.safetensors").exists()
    assert run_python(GUIDE, "evaluate")["results"].numbers["read"] == 2


def cache_weights() -> None:
    """Put made weights into huggingface_hub's cache for the published name that the guide loads: there may be no network."""
    from fused import PRETRAINED, VideoMamba

    [block] = [block for block in blocks_of(GUIDE) if block.extra == "hub"]
    [name] = [name for name in PRETRAINED if f'"{name}"' in block.text]
    published = PRETRAINED[name]
    repository = Path(os.environ["HF_HOME"], "hub", "models--" + published.repository.replace("/", "--"))
    revision = "0" * 40
    for folder in ("refs", f"snapshots/{revision}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs/main").write_text(revision)
    torch.save(VideoMamba(published.config).state_dict(), repository / "snapshots" / revision / published.file)


def hub() -> None:
    """Load published weights by name."""
    cache_weights()
    assert run_python(GUIDE, "hub")["model"].head.out_features == 10


def onnx() -> None:
    """Write an ONNX file as the guide does."""
    run_python(GUIDE, "onnx")
    assert Path("model.onnx").stat().st_size > 10_000


def teachers() -> None:
    """Ask a CLIP of transformers, with random weights."""
    run_python(GUIDE, "teachers")


def language() -> None:
    """Train a BIMBA of random weights on a list of conversations, and ask it, by the guide's commands."""
    sys.path += [str(ROOT / "tests/fused"), str(ROOT / "tests/fused/models")]
    from language_lists import write_bimba_base, write_data

    write_bimba_base(Path("llava-video-7b"))
    write_data(Path("data"))
    shutil.copy("data/dark.avi", "film.mp4")
    shutil.copy("data/list.json", "chats.json")
    [shell] = [block for block in blocks_of(GUIDE) if ".[language]" in block.text]
    train_line, chat_line = [line for line in shell.text.splitlines() if "bimba" in line]
    small = "data.prefix=data data.workers=0 language.frames=2 language.lora_rank=2 batch_size=4 device=cpu"
    run_command(train_line, *small.split())
    run_command(chat_line, "--frames", "2", "--max-new-tokens", "3", "--device", "cpu")


def timm() -> None:
    """Build a model by timm's registry; where timm cannot be imported, see that `register_timm` says so."""
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:  # torchvision built for another build of PyTorch is a RuntimeError
        import fused

        try:
            fused.register_timm()
        except ImportError as refusal:
            print(f"timm: not run, it does not import here ({error}); register_timm says: {refusal}")
            return
        raise AssertionError("register_timm says nothing of a timm that does not import") from error
    cache_weights()  # timm's name in the guide is that of the same weights
    run_python(GUIDE, "timm")


def harness() -> None:
    """Judge a small part, as the front page shows, and look at the machine."""
    text = (ROOT / "README.md").read_text()
    found = re.search(r"`nox -s parity -- (--subject[^`]+)`", text)
    assert found, "README.md no longer shows `nox -s parity -- --subject ...`"
    run_command("python -m harness list")
    run_command("python -m harness doctor")
    run_command("python -m harness parity", *shlex.split(found[1]), "--out", "run")
    assert Path("run/report.html").exists()


RUNS: dict[str, Callable[[], None]] = {
    "base": base, "train": train, "evaluate": evaluate, "hub": hub, "onnx": onnx, "teachers": teachers,
    "language": language, "timm": timm, "harness": harness,
}  # fmt: skip


def main(extra: str) -> None:
    """Run one extra in a folder of its own."""
    for name in ("numpy", "safetensors"):  # PyTorch's folder must not bring what the extra has to bring itself
        spec = importlib.util.find_spec(name)
        assert not spec or Path(str(spec.origin)).is_relative_to(sys.prefix), f"{name} stands beside PyTorch: {spec}"
    folder = Path(tempfile.mkdtemp())
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache")}
    os.chdir(folder)
    try:
        RUNS[extra]()
    finally:
        os.chdir(ROOT)
        shutil.rmtree(folder)
    print(f"{extra}: done")


if __name__ == "__main__":
    main(sys.argv[1])
