"""python -m fused.search --model FOLDER --videos FOLDER_OR_LIST --text TEXT [--top N] [key=value ...]

Exit codes: 0 done; 1 no video could be read, the disk is full, or scores are not finite; 2 a wrong option, model or folder;
130 interrupted by Ctrl-C, features that were made are kept.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from fused.evaluate.retrieval_settings import RetrievalSettings
from fused.evaluate.run import NotFinite
from fused.evaluate.settings import read_settings
from fused.io.atomic_write import NotWritten
from fused.search.search import FEATURES, search
from fused.terminal import DONE, FAILED, INTERRUPTED, SETUP_ERRORS, USAGE, Terminal, escape_what_cannot_be_printed, fail
from fused.train.data.batches import UnreadableFiles


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    command = argparse.ArgumentParser(
        prog="python -m fused.search", description="Print the videos of a folder that are nearest to a text."
    )
    command.add_argument("--model", required=True, help="a folder of a VideoTextRetrieval, or a file of video_mm")
    command.add_argument("--videos", required=True, help="a folder or list of videos")
    command.add_argument("--text", required=True, help="what is looked for, such as 'a dog runs'")
    command.add_argument("--top", type=int, default=5, help="videos that are printed (5)")
    command.add_argument("--features", metavar="FOLDER", help=f"that keeps the features ({FEATURES} beside the videos)")
    command.add_argument("--json", action="store_true", help="print one JSON object a video: video, cosine, match")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="keys of --task retrieval: fused.evaluate --help")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the nearest videos as the command line says (None: sys.argv), and return the exit code."""
    options = parser().parse_intermixed_args(arguments)
    escape_what_cannot_be_printed(sys.stdout)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        settings = read_settings(options.overrides, {}, RetrievalSettings)
        terminal = None if options.json else Terminal()
        found = search(
            options.model, options.videos, options.text, options.top, settings=settings, features=options.features,
            terminal=terminal,
        )  # fmt: skip
    except (NotWritten, NotFinite, UnreadableFiles) as error:
        return fail("fused.search", error, FAILED)
    except SETUP_ERRORS as error:
        return fail("fused.search", error, USAGE)
    except KeyboardInterrupt:
        return fail("fused.search", "stopped; features that were made are kept", INTERRUPTED)
    for one in found:
        if options.json:
            print(json.dumps(one._asdict()))
        else:
            match = "" if one.match is None else f"match {one.match:6.2f}  "
            print(f"{match}cosine {one.cosine:5.2f}  {one.video}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
