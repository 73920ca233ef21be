"""The tasks on conversations: what reads their lists, what learns, rows on the device, and the folder that is written."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused.io.atomic_write import atomic_write
from fused.io.checkpoint_file import save_checkpoint
from fused.models.bimba.adapters import ADAPTER
from fused.models.bimba.load import TRAINED, read_settings
from fused.models.bimba.model import Bimba, compression
from fused.models.bimba.towers import SIGLIP
from fused.models.conversation.tokenizer import read_tokenizer
from fused.models.vamba.begin import Beginning
from fused.models.vamba.load import FLOAT32, assign
from fused.models.vamba.loss import IGNORED
from fused.models.vamba.model import Vamba
from fused.models.vamba.training import STAGES as STAGE_PARTS
from fused.models.vamba.training import groups, select_trainable
from fused.models.vamba.vision import SIDE, vision_tower
from fused.train.config import TrainConfig
from fused.train.language.options import FRAMES, STAGES
from fused.train.language.samples import BimbaReader, Sample, SampleReader, VambaReader
from fused.train.language.students import BimbaStudent, VambaStudent
from fused.train.language.weights import keep_frozen_as_stored, load_weights
from fused.train.tasks import Task

MIXED_SHARDS = "2.9"  # the first version of PyTorch whose FSDP2 shards layers of several dtypes
STORED = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class LanguageTask(Task):
    """A video language model and its training on rows of samples."""

    student: Any
    unit = "samples"

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config, self.tokenizer = config, read_tokenizer(str(config.start))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.student.blocks

    def prepare_row(self, row: Sequence[Sample], weights: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """Return the arguments of `forward` for a row; `weights` are those of tokens and samples in the loss."""
        row = self.completed(row)
        tokens = torch.cat([sample.tokens for sample in row])[None].to(device)
        labels = torch.cat([sample.labels for sample in row])[None].to(device)
        labels[:, _starts(row)] = IGNORED  # the first token of a sample follows none of its own
        frames = [sample.frames.to(device, non_blocking=True) for sample in row if len(sample.frames)]
        layout = torch.tensor([self.place_of(sample) for sample in row])
        return tokens, labels, layout, weights.to(device), *frames

    def completed(self, row: Sequence[Sample]) -> Sequence[Sample]:
        """Return a row with a video: one without gets one that no answer reads.

        So in every step, and in every process, all that learns gets a gradient, if only of 0.
        """
        raise NotImplementedError

    def place_of(self, sample: Sample) -> tuple[int, ...]:
        """Return the sample's line of `layout`, see `VambaStudent.forward`."""
        return len(sample.tokens), sample.video_tokens, sample.place, 0, 0, 0

    def forward(self, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a row, for the output of `prepare_row`."""
        return self.student(*inputs)

    def as_saved(self, name: str, value: Tensor) -> Tensor | None:
        """Return a tensor of the student's state, whole or sharded, as `save` takes it; None for one that it does not take."""
        raise NotImplementedError

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the trained model as a folder for `from_pretrained`; `state` is the student's, as of `as_saved`, on the CPU."""
        raise NotImplementedError

    def trained_parts(self) -> str:
        """Return which parameters learn, in a line."""
        named = dict(self.student.model.named_parameters())
        learnt = [name for name, parameter in named.items() if parameter.requires_grad]
        count, every = sum(named[name].numel() for name in learnt), sum(p.numel() for p in named.values())
        return f"learns {count / 1e6:.4g} of {every / 1e6:.4g} M parameters: {', '.join(self.groups(learnt))}"

    def groups(self, names: Sequence[str]) -> list[str]:
        """Return the parts of the model that hold these parameters."""
        return groups(names)


class VambaTask(LanguageTask):
    """Stages 1 and 2 of Vamba: packed samples, next-token loss on answers, and in stage 1 a distillation if wanted."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        options = config.language
        self.beginning = Beginning(str(config.start), backend=config.backend, mixer=options.mixer)
        model = self.beginning.model
        try:
            select_trainable(model, options.trainable or STAGES[str(config.task)])
        except ValueError as error:
            raise ValueError(f"language.trainable is {options.trainable!r}; {error}") from error
        if options.distillation and (parts := _changed(model)):
            raise ValueError(
                f"language.distillation is {options.distillation}, and {', '.join(parts)} learn; allowed: 0, or a "
                "language.trainable without parts of the stock model, which is the teacher"
            )
        if keeps_stored(config):
            keep_frozen_as_stored(self.beginning)
        self.student = VambaStudent(model, options)

    def load_weights(self, device: torch.device) -> None:
        load_weights(self.student, self.beginning, device)

    def completed(self, row: Sequence[Sample]) -> Sequence[Sample]:
        if any(sample.video_tokens for sample in row):
            return row
        frames = torch.zeros(2, 3, 2 * SIDE, 2 * SIDE, dtype=torch.uint8)
        return [*row, Sample(torch.zeros(1, dtype=torch.long), torch.full((1,), IGNORED), frames, 4, 0)]

    def place_of(self, sample: Sample) -> tuple[int, ...]:
        frames, _, height, width = sample.frames.shape
        return len(sample.tokens), sample.video_tokens, sample.place, frames // 2, height // SIDE, width // SIDE

    def as_saved(self, name: str, value: Tensor) -> Tensor:
        return value.to(torch.float32 if name.rpartition(".")[2] in FLOAT32 else STORED[self.config.precision])

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        student: Vamba = self.student.model
        with torch.device("meta"):
            model = Vamba(student.config)
        model.visual = vision_tower(dict(student.vision_config or {}), weights=False)
        for name, value in state.items():
            assign(model, name.removeprefix("model."), value)
        model.vision_config, model.stop_tokens = student.vision_config, student.stop_tokens
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class BimbaTask(LanguageTask):
    """BIMBA's training: adapters of the language model, the projector and the compressor."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        dtype = None if keeps_stored(config) else torch.float32
        model = Bimba.from_base(str(config.start), backend=config.backend, dtype=dtype)
        self.student = BimbaStudent(model, config.language)

    def load_weights(self, device: torch.device) -> None:
        self.to(device)

    def groups(self, names: Sequence[str]) -> list[str]:
        adapted = dict.fromkeys(name.partition(".lora_")[0].rpartition(".")[2] for name in names if "lora_" in name)
        others = dict.fromkeys(name.partition(".")[0] for name in names if "lora_" not in name)
        return [f"adapters of rank {self.config.language.lora_rank} of {' and '.join(adapted)}", *others]

    def completed(self, row: Sequence[Sample]) -> Sequence[Sample]:
        model: Bimba = self.student.model
        frames = torch.zeros(model.temporal_pooling, 3, model.image_size, model.image_size)
        return [sample if sample.video_tokens else sample._replace(frames=frames) for sample in row]

    def as_saved(self, name: str, value: Tensor) -> Tensor | None:
        return value if "lora_" in name or name.startswith(("model.mm_projector.", "model.compressor.")) else None

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        trained = {name.removeprefix("model."): value for name, value in state.items()}
        adapters = {
            f"base_model.model.{name.removeprefix('language_model.').replace('.default.', '.')}": value.contiguous()
            for name, value in trained.items() if "lora_" in name
        }  # fmt: skip
        beside = {
            f"base_model.model.model.{name}": value
            for name, value in trained.items() if "lora_" not in name
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(adapters, folder / "adapter_model.safetensors")
        with atomic_write(folder / TRAINED) as draft:
            torch.save(beside, draft)
        base = self.student.model.base_folder
        config = {**read_settings(base / "config.json"), "compressor_type": self.student.model.compressor_kind}
        lora = self.student.lora
        described = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.r, "lora_alpha": lora.lora_alpha,
            "lora_dropout": lora.lora_dropout, "target_modules": sorted(lora.target_modules), "bias": "none",
            "base_model_name_or_path": str(base.absolute()),
        }  # fmt: skip
        for name, content in (("config.json", config), (ADAPTER, described)):
            with atomic_write(folder / name) as draft:
                draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_reader(config: TrainConfig) -> SampleReader:
    """Return what reads the samples of a task. Raises FileNotFoundError, OSError or CheckpointError for a wrong `start`."""
    if not Path(str(config.start)).is_dir():  # which would be asked of the hub
        advice = "a repository of the Hugging Face hub has to be downloaded first (hf download NAME --local-dir FOLDER)"
        raise FileNotFoundError(f"start is {config.start!r}, and there is no such folder; allowed: that of a model; {advice}")
    options, tokenizer = config.language, read_tokenizer(str(config.start))
    frames = options.frames or FRAMES[str(config.task)]
    if config.task != "bimba-sft":
        if frames % 2:
            raise ValueError(f"language.frames is {frames}; allowed: an even number, since a Vamba reads frames in pairs")
        return VambaReader(tokenizer, frames, options.longest, options.length)
    base = read_settings(Path(str(config.start)) / "config.json")
    if frames < (pooling := compression(base)[1]):
        raise ValueError(f"language.frames is {frames}; allowed: from {pooling} up, temporal_pooling of {config.start}")
    sizes = {**SIGLIP, **(base.get("vision_config") or {})}
    side, patch = sizes["image_size"], sizes["patch_size"]
    return BimbaReader(tokenizer, frames, options.length, options.time_instruction, base, side, patch)


def build_language_task(config: TrainConfig, device: torch.device) -> LanguageTask:
    """Return the task with its model on `device`, for one process. Raises what `make_language_task` raises."""
    task = make_language_task(config)
    task.load_weights(device)
    return task


def make_language_task(config: TrainConfig) -> LanguageTask:
    """Return the task, whose weights `load_weights` has to load.

    Raises what loading the folder `start` raises, ImportError without peft.
    """
    return BimbaTask(config) if config.task == "bimba-sft" else VambaTask(config)


def keeps_stored(config: TrainConfig) -> bool:
    """Return whether what does not learn stays as it is stored: under autocast its products have half precision in any case."""
    return config.precision != "float32" and (config.parallel != "fsdp" or torch.__version__ >= MIXED_SHARDS)


def _starts(row: Sequence[Sample]) -> list[int]:
    """Return the places of the samples' first tokens."""
    starts, length = [], 0
    for sample in row:
        starts.append(length)
        length += len(sample.tokens)
    return starts


def _changed(model: Vamba) -> list[str]:
    """Return the modules of the stock model that learn."""
    own = STAGE_PARTS["pretrain"]
    learnt = [name for name, p in model.named_parameters() if p.requires_grad and not any(part in name for part in own)]
    return groups(learnt)
