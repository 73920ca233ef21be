"""python -m fused.train --config FILE.yaml [key=value ...]

Exit codes: 0 done, 1 failed while training, 2 a wrong option, configuration, model or folder, 130 interrupted: a checkpoint
was saved, and the same command goes on.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from fused.train import run_folder as runs
from fused.train.checkpoints import NotWritten
from fused.train.config_file import read_config, written
from fused.train.data.clips import Unreadable
from fused.train.loop import Diverged, Trainer
from fused.train.parallel import joined
from fused.train.seed import setup_seed

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
WRONG = (ValueError, TypeError, OSError, ImportError, RuntimeError)  # what setting up says of what it was given


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fused.train",
        description="Fine-tune, pretrain or distil a VideoMamba on a folder of videos. A run that was stopped, in any way, "
        "goes on with the same command.",
        epilog="Keys and their defaults: --print-config. Several GPUs: torchrun --nproc-per-node N -m fused.train ...",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="the configuration, YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over it, such as data.frames=16 optim.lr=1e-4")
    parser.add_argument("--print-config", action="store_true", help="print the effective configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="also make the models and look at the data, but take no step")
    options = parser.parse_intermixed_args(arguments)
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.INFO if first else logging.ERROR)

    code = USAGE
    try:
        config = read_config(options.config, options.overrides)
        if first and (options.print_config or options.dry_run):
            print(written(config).rstrip())
        if options.print_config:
            return DONE
        setup_seed(config.seed, config.deterministic)
        with joined(config.device) as world:
            trainer = Trainer(config, world)
            if options.dry_run:
                print(*(runs.describe(trainer) if first else ()), sep="\n")
                return DONE
            code = FAILED
            outcome = trainer.run()
    except (Diverged, NotWritten, Unreadable) as error:
        return _fail(error, FAILED)
    except WRONG as error:
        if code == FAILED:  # nothing that is known: the traceback tells more
            raise
        return _fail(error, USAGE)
    except KeyboardInterrupt:  # a second Ctrl-C, or one before the first step
        return _fail("stopped at once; the same command goes on from the last checkpoint", INTERRUPTED)
    if outcome.interrupted and first:
        print(f"stopped behind step {outcome.step} of {outcome.total}, saved as {outcome.checkpoint}; the same command goes on")
    return INTERRUPTED if outcome.interrupted else DONE


def _fail(why: object, code: int) -> int:
    print(f"fused.train: {why}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
