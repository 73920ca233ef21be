"""python -m fused.features --model FOLDER_OR_NAME --data FOLDER_OR_LIST --out FILE.safetensors [key=value ...]

Exit codes: 0 done; 1 no video could be read, the disk is full, or features are not finite; 2 a wrong option, model or data;
130 interrupted by Ctrl-C.
"""

import argparse
import sys
from collections.abc import Sequence

from fused.evaluate.protocols import add_view_options
from fused.evaluate.run import NotFinite
from fused.evaluate.settings import VIEW_OPTIONS, Settings, read_settings
from fused.features.extract import check_suffix, extract
from fused.io.atomic_write import NotWritten
from fused.models.videomamba.model import VideoMamba, VideoMambaEncoder
from fused.terminal import (
    DONE,
    FAILED,
    INTERRUPTED,
    SETUP_ERRORS,
    USAGE,
    Terminal,
    bad_file_reasons,
    escape_what_cannot_be_printed,
    fail,
)
from fused.train.parallel import joined_world
from fused.train.run_folder import check_writable


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    command = argparse.ArgumentParser(
        prog="python -m fused.features", description="Write a vector, or all tokens, of each video to a file, with its name."
    )
    command.add_argument("--model", required=True, help="a folder of save_pretrained, or a name in fused.PRETRAINED")
    command.add_argument("--data", required=True, help="a folder or list of videos")
    command.add_argument("--out", required=True, help="a file that ends with .safetensors or .npy")
    command.add_argument("--encoder", action="store_true", help="the model is a VideoMambaEncoder, of a pretraining")
    command.add_argument("--tokens", action="store_true", help="all tokens of a video, not one vector")
    command.add_argument("--chunk-frames", type=int, metavar="N", help="run long clips in the memory of N frames")
    add_view_options(command)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="keys of fused.evaluate, see its --help: window=60")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Write features as the command line says (None: sys.argv), and return the exit code."""
    options = parser().parse_intermixed_args(arguments)
    escape_what_cannot_be_printed(sys.stdout)
    try:
        check_writable(check_suffix(options.out).parent)  # it is written at the end, which may be hours later
        given = {name: getattr(options, name) for name in VIEW_OPTIONS}
        settings: Settings = read_settings(options.overrides, given)
        kind = VideoMambaEncoder if options.encoder else VideoMamba
        with joined_world(settings.device) as world:
            overrides = settings.model_fields()
            model = kind.from_pretrained(options.model, backend=settings.backend, **overrides).to(world.device)
            chunk_frames, is_main = options.chunk_frames, world.is_main
            features = extract(
                model, options.data, settings, tokens=options.tokens, chunk_frames=chunk_frames, world=world,
                terminal=Terminal() if is_main else None,
            )  # fmt: skip
        if not is_main:
            return DONE if features.names else FAILED
        if not features.names:
            return fail("fused.features", "no video could be read", FAILED)
        features.save(options.out)
    except (NotWritten, NotFinite) as error:
        return fail("fused.features", error, FAILED)
    except SETUP_ERRORS as error:
        return fail("fused.features", error, USAGE)
    except KeyboardInterrupt:
        return fail("fused.features", "stopped; nothing was written", INTERRUPTED)
    too_short = sum(file.too_short for file in features.bad_files)
    total = len(features.bad_files) + len({name.rpartition("#")[0] or name for name in features.names})
    reasons = bad_file_reasons(len(features.bad_files) - too_short, too_short, total)
    shape = "x".join(map(str, features.values[0].shape))
    print(f"{len(features.names)} features of {shape} are in {options.out}{'; ' if reasons else ''}{reasons}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
