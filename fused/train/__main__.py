"""python -m fused.train [--config FILE.yaml | --config recipe:NAME] [key=value ...]

Exit codes: 0 done; 1 failed while training; 2 a wrong option, configuration, model or folder; 130 interrupted by Ctrl-C or
SIGTERM, a checkpoint was saved, and the same command resumes. A second signal, at least a second after the first, ends at once.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fused.io.atomic_write import NotWritten
from fused.terminal import DONE, FAILED, INTERRUPTED, SETUP_ERRORS, USAGE, escape_what_cannot_be_printed, fail
from fused.train.config_file import read_config, to_yaml
from fused.train.data.batches import UnreadableFiles
from fused.train.language.options import LANGUAGE_TASKS
from fused.train.language.trainer import LanguageTrainer
from fused.train.loop import Diverged, Trainer
from fused.train.parallel import joined_world
from fused.train.recipes import describe_recipe, recipe_names
from fused.train.run_folder import check_writable
from fused.train.seed import setup_seed

NOTHING_GIVEN = """task, out, data.train and a number of steps or epochs are needed, in a file or as key=value. For example:
  python -m fused.train task=finetune out=runs/first data.train=videos/train epochs=30 --dry-run
  python -m fused.train --print-config > run.yaml    # every key; complete it for --config run.yaml"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says (None: sys.argv), and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fused.train",
        description="Train a VideoMamba on a folder of videos, or a Vamba or BIMBA on conversations. A run that was stopped "
        "goes on with the same command.",
        epilog="Keys and their defaults: --print-config. Several GPUs: torchrun --nproc-per-node N -m fused.train ...",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="the configuration, YAML; or recipe:NAME, a published training")
    parser.add_argument("--recipes", action="store_true", help="list the published trainings, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over it, such as data.frames=16 optim.lr=1e-4")
    parser.add_argument("--print-config", action="store_true", help="print every key, its value or default, and stop")
    parser.add_argument("--dry-run", action="store_true", help="also make the models and look at the data, but take no step")
    options = parser.parse_intermixed_args(arguments)
    is_main = os.environ.get("RANK", "0") == "0"
    escape_what_cannot_be_printed(sys.stdout)
    logging.basicConfig(format="%(message)s", level=logging.INFO if is_main else logging.ERROR)

    if options.recipes:
        print(*(f"{name:25} {describe_recipe(name)}" for name in recipe_names()), sep="\n")
        return DONE
    training = False
    try:
        if options.config is None and not options.overrides and not options.print_config:
            print(f"fused.train: {NOTHING_GIVEN}", file=sys.stderr)
            return USAGE
        config = read_config(options.config, options.overrides, complete=not options.print_config)
        if is_main and (options.print_config or options.dry_run):
            print(to_yaml(config).rstrip())
        if options.print_config:
            return DONE
        if is_main:
            check_writable(Path(str(config.out)))
        setup_seed(config.seed, config.deterministic)
        with joined_world(config.device) as world:
            trainer = (LanguageTrainer if config.task in LANGUAGE_TASKS else Trainer)(config, world)
            if options.dry_run:
                print(*(trainer.describe() if is_main else ()), sep="\n")
                return DONE
            training = True
            interrupted = trainer.run()
    except (Diverged, NotWritten, UnreadableFiles) as error:
        return fail("fused.train", error, FAILED)
    except SETUP_ERRORS as error:
        if training:  # an unexpected error, whose traceback is needed
            raise
        return fail("fused.train", error, USAGE)
    except KeyboardInterrupt:  # a second Ctrl-C, or one before the first step
        return fail("fused.train", "stopped at once; the same command goes on from the last checkpoint", INTERRUPTED)
    if interrupted and is_main:
        position = f"step {trainer.step} of {trainer.total}"
        print(f"stopped behind {position}, saved as {trainer.checkpoint}; the same command goes on")
    return INTERRUPTED if interrupted else DONE


if __name__ == "__main__":
    sys.exit(main())
