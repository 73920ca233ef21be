"""python -m fused.predict --model FOLDER_OR_NAME FILE [FILE ...]

Exit codes: 0 done; 1 at least one file gave no prediction; 2 a wrong option or model; 130 interrupted by Ctrl-C.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from fused.evaluate.protocols import add_view_options, choose_views
from fused.io.preprocessing import SHORT
from fused.io.video import VideoError
from fused.io.views import Views
from fused.models.videomamba.classify import check_classes, classify, preprocessing_of, read_class_names
from fused.models.videomamba.model import VideoMamba
from fused.terminal import DONE, FAILED, INTERRUPTED, SETUP_ERRORS, USAGE, escape_what_cannot_be_printed, fail
from fused.train.parallel import joined_world


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    command = argparse.ArgumentParser(
        prog="python -m fused.predict", description="Print the most likely classes of video files, or of folders of images."
    )
    command.add_argument("files", nargs="+", metavar="FILE", help="a video file, or a folder of images")
    command.add_argument("--model", required=True, help="a folder of save_pretrained, or a name in fused.PRETRAINED")
    command.add_argument("--top", type=int, default=5, help="classes of a file (5)")
    command.add_argument("--json", action="store_true", help="print one JSON object a file: video, top, or error")
    command.add_argument("--labels", metavar="FILE", help="a class name in each line, for a model whose folder has none")
    add_view_options(command)
    command.add_argument("--short", choices=SHORT, help="what a video of too few frames is (of the model's folder, else drop)")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="a GPU if there is one (auto)")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the most likely classes of files as the command line says (None: sys.argv), and return the exit code."""
    options = parser().parse_intermixed_args(arguments)
    escape_what_cannot_be_printed(sys.stdout)
    try:
        if options.top < 1:
            raise ValueError(f"top is {options.top}; allowed: a number from 1 up")
        views = choose_views(options.protocol, options.views, options.crops, options.resize)
        with joined_world(options.device) as world:
            model = VideoMamba.from_pretrained(options.model).to(world.device)
        check_classes(model)
        if options.labels is not None:
            model.labels = tuple(read_class_names(options.labels))
        model.preprocessing = preprocessing_of(model)
        if options.short is not None:
            model.preprocessing = replace(model.preprocessing, short=options.short)
        views.check(model.preprocessing)
    except SETUP_ERRORS as error:
        return fail("fused.predict", error, USAGE)
    try:
        return predict(model, views, options)
    except KeyboardInterrupt:
        return fail("fused.predict", "stopped", INTERRUPTED)
    except BrokenPipeError:  # who reads the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes
        return FAILED


def predict(model: VideoMamba, views: Views, options: argparse.Namespace) -> int:
    """Print the most likely classes of the files that `options` name, and return the exit code."""
    failed = 0
    for file in options.files:
        try:
            top = classify(model, file, options.top, views=views)
        except VideoError as error:
            failed += 1
            print(f"fused.predict: {error}", file=sys.stderr)
            if options.json:
                print(json.dumps({"video": file, "error": str(error)}), flush=True)
            continue
        if options.json:
            print(json.dumps({"video": file, "top": top}), flush=True)
        else:
            print(f"{file}:", *(f"  {share:7.2%}  {name}" for name, share in top), sep="\n", flush=True)
    return FAILED if failed else DONE


if __name__ == "__main__":
    sys.exit(main())
