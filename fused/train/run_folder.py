"""A run's folder: config.yaml, log.jsonl, checkpoints/, and model/ at the end."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from fused.io.atomic_write import written_whole
from fused.models.videomamba.model import VideoMamba, VideoMambaEncoder
from fused.train import checkpoints
from fused.train.config import HARMLESS, TrainConfig, flat
from fused.train.config_file import parse, written
from fused.train.log import Log, summary_writer

if TYPE_CHECKING:
    from fused.train.loop import Trainer

CONFIG, CHECKPOINTS, MODEL = "config.yaml", "checkpoints", "model"


def check(folder: Path, config: TrainConfig) -> list[str]:
    """What differs from the configuration of the run in this folder, where it has a checkpoint to go on from.

    Raises ValueError if something does that its weights depend on, ImportError if what will be written needs a package that
    is not there: better now than at the end.
    """
    if config.tensorboard:
        summary_writer()
    if find_spec("safetensors") is None:
        raise ImportError("safetensors is not installed, with which the trained model is written: pip install safetensors")
    if checkpoints.newest(folder / CHECKPOINTS) is None:
        return []
    before, now = flat(parse((folder / CONFIG).read_text(), str(folder / CONFIG))), flat(config.described())
    changed = {key: f"{key}: {before.get(key)} -> {now.get(key)}" for key in now | before if before.get(key) != now.get(key)}
    refused = [change for key, change in changed.items() if key not in HARMLESS]
    if refused:
        raise ValueError(
            f"{folder} holds a run with another configuration, which differs in {'; '.join(refused)}. Go on with the one in "
            f"{folder / CONFIG}, or set another out"
        )
    return [change for key, change in changed.items() if key != "out"]


def begin(trainer: "Trainer") -> Log:
    """The log of a run that starts or goes on; the first process alone calls it."""
    config, folder = trainer.config, trainer.folder
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder, trainer.step, trainer.total, config.tensorboard)
    for line in describe(trainer):
        log.say(line)
    with written_whole(folder / CONFIG) as draft:
        draft.write_text(written(config))
    return log


def describe(trainer: "Trainer") -> list[str]:
    """What will be trained, on what, and from where, in words."""
    config, student, world = trainer.config, trainer.task.student, trainer.world
    count = sum(p.numel() for p in student.parameters()) / 1e6
    name = "VideoMambaEncoder" if config.task == "pretrain" else "VideoMamba"
    processes = f"{world.size} processes" if world.size > 1 else "1 process"
    classes = f" in {len(trainer.data.classes)} classes" if trainer.data.classes else ""
    lines = [
        f"{config.task}: {name}, {count:.3g} M parameters, on {world.device.type}, {processes}",
        f"{len(trainer.data)} videos{classes}, {trainer.per_epoch} steps an epoch, {trainer.total} steps",
    ]
    if trainer.checkpoint is not None:
        lines.append(f"goes on behind step {trainer.step}, from {trainer.checkpoint}")
        lines += [f"  {change}" for change in trainer.changed]
    return lines


def finish(trainer: "Trainer", log: Log | None) -> Path:
    """The trained model as a folder for `from_pretrained`; every process calls it."""
    student: Any = trainer.task.student
    state = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    folder = trainer.folder / MODEL
    if log is not None:
        kind = VideoMambaEncoder if trainer.config.task == "pretrain" else VideoMamba
        whole = kind(student.config)  # the student itself may be spread
        whole.load_state_dict(state)
        whole.save_pretrained(folder)
        count = len(log.bad)
        bad = f"; {count} file{'s' * (count > 1)} could not be read, log.jsonl names them" if count else ""
        log.say(f"done: {trainer.step} steps; the model is in {folder}{bad}")
    return folder
