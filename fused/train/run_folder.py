"""The folder of a run: config.yaml, log.jsonl, checkpoints/, best/, and at the end model/, with an EMA also model-ema/."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from fused.io.atomic_write import atomic_write
from fused.models.retrieval.model import VideoTextRetrieval
from fused.models.videomamba.model import VideoMamba, VideoMambaEncoder
from fused.train import checkpoints
from fused.train.config import TrainConfig, flatten
from fused.train.config_file import parse_yaml, to_yaml
from fused.train.config_keys import RESUMABLE_KEYS
from fused.train.ema import WeightAverage
from fused.train.log import Log, import_summary_writer
from fused.train.parallel import World
from fused.train.task import Student

CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"
MODEL, MODEL_EMA, BEST = "model", "model-ema", "best"  # folders for `from_pretrained`


def check_writable(folder: Path) -> None:
    """Raise ValueError unless files can be written to the folder of a run, which may not be there yet. Nothing stays there.

    For a missing folder the test is a temporary one in the nearest folder above it that is there.
    """
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
        if there == folder:
            tempfile.TemporaryFile(dir=folder).close()
        else:
            tempfile.TemporaryDirectory(dir=there, prefix=".fused-").cleanup()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"out is {str(folder)!r}, where nothing can be written ({reason}); allowed: a folder") from error


def check_run(folder: Path, config: TrainConfig) -> list[str]:
    """Return how `config` differs from the configuration of the run that the folder holds, as "key: before -> now".

    A folder without a checkpoint holds no run. A key that its configuration lacks is newer than the run, which had the
    default value. Raises ValueError if a key differs that the weights depend on, and ImportError if a package is missing that
    the run will need at its end.
    """
    if config.tensorboard:
        import_summary_writer()
    if find_spec("safetensors") is None:
        raise ImportError("safetensors is not installed, with which the trained model is written: pip install safetensors")
    if checkpoints.newest(folder / CHECKPOINTS) is None:
        return []
    defaults = flatten(TrainConfig(task=config.task, complete=False).used_keys())
    stored = defaults | flatten(parse_yaml((folder / CONFIG).read_text(), str(folder / CONFIG)))
    given = flatten(config.used_keys())
    changes = {
        key: f"{key}: {stored.get(key)} -> {given.get(key)}" for key in given | stored if stored.get(key) != given.get(key)
    }
    refused = [change for key, change in changes.items() if key not in RESUMABLE_KEYS]
    if refused:
        raise ValueError(
            f"{folder} holds a run with another configuration, which differs in {'; '.join(refused)}. Go on with the one in "
            f"{folder / CONFIG}, or set another out"
        )
    return [change for key, change in changes.items() if key != "out"]


def open_run(folder: Path, config: TrainConfig, step: int, total: int, description: Sequence[str]) -> Log:
    """Create the folder, write the configuration, and return the log of a run that continues after `step` of `total` steps.

    The lines of `description` are printed. Only the main process calls this function. Raises NotWritten and other OSErrors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder, step, total, config.tensorboard)
    for line in description:
        log.print_line(line)
    with atomic_write(folder / CONFIG) as draft:
        draft.write_text(to_yaml(config))
    return log


def save_models(
    folder: Path, config: TrainConfig, student: Student, average: WeightAverage | None, world: World
) -> list[Path]:
    """Write the trained student, and its EMA if there is one, and return the paths. Every process calls this function."""
    written = [save_model(folder, config, student, world)]
    if average is not None:
        with average.swapped():
            written.append(save_model(folder, config, student, world, MODEL_EMA))
    return written


def save_model(
    folder: Path, config: TrainConfig, student: Student, world: World, name: str = MODEL
) -> Path:
    """Write the student as the folder `name` for `from_pretrained`, and return its path. Every process calls this function.

    A student of distillation is written as a classifier, without its distillation head, which only checkpoints keep.
    """
    if isinstance(student, VideoTextRetrieval):  # which is never sharded
        return student.save_pretrained(folder / name) if world.is_main else folder / name
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(student, options=options)  # gathers the shards of all processes
    if world.is_main:
        kind = VideoMambaEncoder if config.task == "pretrain" else VideoMamba
        model = kind(replace(student.config, distill_dim=None))  # a new one, since the student may be sharded
        model.load_state_dict({name: value for name, value in state.items() if not name.startswith("distill_head.")})
        model.preprocessing = student.preprocessing
        if isinstance(model, VideoMamba) and isinstance(student, VideoMamba):
            model.labels = student.labels
        model.save_pretrained(folder / name)
    return folder / name
