"""python -m fused.evaluate --model FOLDER_OR_NAME --data FOLDER_OR_LIST [--views N --crops N] [key=value ...]
   python -m fused.evaluate --task retrieval --model FOLDER --data CAPTIONS.csv [key=value ...]

Exit codes: 0 done; 1 no video could be read, the disk is full, or the model's outputs are not finite; 2 a wrong option, model
or data; 130 interrupted by Ctrl-C or SIGTERM, and the same command goes on.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fused.evaluate.protocols import add_view_options
from fused.evaluate.retrieval import RetrievalEvaluation
from fused.evaluate.retrieval_settings import RetrievalSettings
from fused.evaluate.run import Evaluation, NotFinite
from fused.evaluate.settings import VIEW_OPTIONS, Settings, describe_keys, read_settings
from fused.io.atomic_write import NotWritten
from fused.terminal import DONE, FAILED, INTERRUPTED, SETUP_ERRORS, USAGE, Terminal, escape_what_cannot_be_printed, fail
from fused.train.data.batches import UnreadableFiles
from fused.train.interrupt import Interrupt
from fused.train.parallel import joined_world


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    words = argparse.ArgumentParser(
        prog="python -m fused.evaluate",
        description="Test a VideoMamba on a folder or list of videos. What was stopped goes on with the same command.",
        epilog=f"keys, with their defaults:\n{describe_keys(Settings)}\n"
        f"keys of --task retrieval:\n{describe_keys(RetrievalSettings)}\n"
        "Several GPUs: torchrun --nproc-per-node N -m fused.evaluate ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words.add_argument("--model", required=True, help="a folder of save_pretrained, or a name in fused.PRETRAINED")
    lists = "a list with path,label in each line; for retrieval path,caption"
    words.add_argument("--data", required=True, help=f"a folder of class folders, or {lists}")
    words.add_argument("--out", default="evaluation", help="the folder of predictions and results (evaluation)")
    words.add_argument("--task", choices=("classify", "retrieval"), default="classify", help="of what (classify)")
    add_view_options(words)
    words.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as batch_size=16 precision=bfloat16")
    return words


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says (None: sys.argv), and return the exit code."""
    options = parser().parse_intermixed_args(arguments)
    is_main = os.environ.get("RANK", "0") == "0"
    escape_what_cannot_be_printed(sys.stdout)
    logging.basicConfig(format="%(message)s", level=logging.INFO if is_main else logging.ERROR)

    running = False
    try:
        given = {name: getattr(options, name) for name in VIEW_OPTIONS}
        settings: Settings | RetrievalSettings
        if options.task == "retrieval":
            if views := [f"--{name}" for name, value in given.items() if value is not None]:
                raise ValueError(f"{views[0]} is given; allowed with --task retrieval: key=value words")
            settings = read_settings(options.overrides, {}, RetrievalSettings)
        else:
            settings = read_settings(options.overrides, given)
        with joined_world(settings.device) as world, Interrupt() as interrupt:
            evaluation: Evaluation | RetrievalEvaluation
            if isinstance(settings, RetrievalSettings):
                evaluation = RetrievalEvaluation(options.model, options.data, options.out, settings, world)
            else:
                evaluation = Evaluation(options.model, options.data, options.out, settings, world)
            terminal = Terminal() if is_main else None
            if terminal is not None:
                terminal.print_line(describe(evaluation))
                for note in evaluation.notes:
                    terminal.print_line(note)
            running = True
            results = evaluation.run(interrupt, terminal)
    except (NotWritten, NotFinite, UnreadableFiles) as error:
        return fail("fused.evaluate", error, FAILED)
    except SETUP_ERRORS as error:
        if running:  # an unexpected error, whose traceback is needed
            raise
        return fail("fused.evaluate", error, USAGE)
    except KeyboardInterrupt:  # a second Ctrl-C
        return fail("fused.evaluate", "stopped at once; the same command goes on", INTERRUPTED)
    if results is None:
        if is_main:
            print(f"stopped; the same command goes on, {options.out} holds the videos that are finished")
        return INTERRUPTED
    if is_main:
        print(results)
        beside = "queries.jsonl" if options.task == "retrieval" else "predictions.jsonl"
        every = "text" if options.task == "retrieval" else "video"
        print(f"{Path(options.out) / 'results.json'} has the numbers, {beside} beside it every {every}")
    return DONE if results.numbers["read"] else FAILED


def describe(evaluation: Evaluation | RetrievalEvaluation) -> str:
    """Return a line for the terminal: the videos, the views of each, and how their pixels are made."""
    if isinstance(evaluation, RetrievalEvaluation):
        clips, captions = evaluation.engine.preprocessing, sum(len(entry.captions) for entry in evaluation.entries)
        shown = f"{clips.frames} frames at {clips.size} pixels ({clips.sampling}, {clips.crop})"
        return f"{len(evaluation.videos)} videos, {captions} captions, {shown}"
    views, preprocessing = evaluation.views, evaluation.preprocessing
    of = "images" if preprocessing.frames is None else f"{preprocessing.frames} frames"
    rule = preprocessing.sampling if views.frames == "model" else views.frames
    windows = f", of windows of {views.windows.seconds:g} s every {views.windows.every:g} s" if views.windows else ""
    counts = f"{len(evaluation.videos)} videos, {views.clips} x {views.crops} views of {of} at {preprocessing.size} pixels"
    return f"{counts} ({rule}, {views.resize}){windows}"


if __name__ == "__main__":
    sys.exit(main())
