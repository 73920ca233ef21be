"""One step of the optimiser over its micro-batches: eager, or as CUDA graphs with the same bits.

A step has up to three graphs: forward and backward of its first micro-batch, which makes the gradients; the same of a further
one, which adds to them; and the update, which is clipping, the optimiser and the EMA. Between backward and update the gradients
are averaged over processes, outside of the graphs. What changes from step to step reaches a graph through memory: the batch is
copied into the tensors that it reads, the learning rates are a tensor, and a seed set before a replay is the replay's. The
first steps of each shape run eagerly, which compiles kernels; they are steps as any other.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused.runtime.graphs import WARMUP, CudaRecorder, Recorder, Recording
from fused.train import parallel
from fused.train.config import TrainConfig
from fused.train.ema import WeightAverage
from fused.train.language.options import LANGUAGE_TASKS
from fused.train.parallel import World
from fused.train.tasks import Task

AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHAPES = 4  # of micro-batches that have graphs; others run eagerly

_log = logging.getLogger("fused")


def eager_reason(config: TrainConfig, device: torch.device) -> str | None:
    """Return why the steps of a training cannot be CUDA graphs, None if they can."""
    if config.task == "retrieval":
        return "hard negatives are chosen on the host"
    if device.type != "cuda":
        return f"the model is on the {device.type.upper()}"
    if config.task in LANGUAGE_TASKS:
        return "rows of conversations differ in length"
    return "FSDP gathers parameters by code on the host" if config.parallel == "fsdp" else None


def choose_recorder(config: TrainConfig, device: torch.device) -> tuple[Recorder | None, str]:
    """Return the recorder of a training's steps, None for eager ones, and a line that says which and why.

    Raises ValueError for `graph: on` where that cannot be.
    """
    reason = "it is switched off" if config.graph == "off" else eager_reason(config, device)
    if reason is None:
        return CudaRecorder(device), f"graph: {config.graph}; steps are CUDA graphs after {WARMUP} eager ones"
    if config.graph == "on":
        raise ValueError(f"graph is 'on', but {reason}; allowed: 'auto' or 'off'")
    return None, f"graph: {config.graph}; steps are eager: {reason}"


@dataclass
class Graphs:
    """The graphs of one shape of micro-batches."""

    eager_steps: int = 0  # that were taken with this shape
    inputs: tuple[Tensor, ...] = ()  # which the graphs read
    gradients: list[Tensor | None] = field(default_factory=list)  # which they write, of each parameter
    first: Recording | None = None
    further: Recording | None = None
    update: Recording | None = None


class TrainStep:
    """The steps of a training. Every process of the world makes one and takes the same steps.

    `recorder` makes the graphs; None: every step is eager. A forward or backward that cannot be recorded ends the attempts with
    a warning, or with an error for `graph: on`.
    """

    def __init__(
        self, config: TrainConfig, task: Task, world: World, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
        average: WeightAverage | None, recorder: Recorder | None,
    ) -> None:  # fmt: skip
        self.config, self.task, self.world, self.optimizer = config, task, world, optimizer
        self.scaler, self.average, self.recorder = scaler, average, recorder
        self.micro_batches = config.accumulate  # of this step
        self.names: tuple[str, ...] = ()  # of the loss and the metrics, known after the first micro-batch
        task.train()  # a student that was loaded comes in eval mode
        self._parameters = list(task.student.parameters())
        self._graphs: dict[Any, Graphs] = {}
        self._key: Any = None  # of the first micro-batch of this step
        self._current: Graphs | None = None  # the graphs of its shape
        self._replayed = False  # whether its first micro-batch was a replay
        self._holders: Graphs | None = None  # whose gradients the parameters hold, None for those of an eager step
        self._sums = torch.zeros(0)  # of the loss and the metrics over the micro-batches of this step

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the configured precision."""
        dtype = AUTOCAST_DTYPES.get(self.config.precision)
        return torch.autocast(self.world.device.type, dtype, enabled=dtype is not None)

    def add(self, position: int, clips: Tensor, targets: Tensor, seed: int) -> None:
        """Run forward and backward of micro-batch number `position` of a step, 0 for the first.

        `targets` are as from the task's `encode`; `seed` is that of all random numbers.
        """
        generator = torch.Generator().manual_seed(seed)
        self.add_inputs(position, lambda: self.task.prepare(clips, targets, generator), seed)

    def add_inputs(self, position: int, prepare: Callable[[], tuple[Tensor, ...]], seed: int) -> None:
        """Run forward and backward of a micro-batch whose arguments of the task's `forward` are what `prepare` returns."""
        if not self.task.training:
            self.task.train()
        with self.autocast():
            inputs = prepare()
        key = tuple((x.shape, x.dtype) for x in inputs)
        if position == 0:
            self._key, self._current = key, self._find(key)
            self._replayed = self._current is not None and self._current.eager_steps >= WARMUP
        torch.manual_seed(seed)  # for the model: stochastic depth, dropout
        if self._replayed and self._current is not None and key == self._key:
            if self._replay(self._current, position, inputs):
                return
            torch.manual_seed(seed)
        if position == 0:
            self.optimizer.zero_grad()
            self._replayed, self._holders = False, None
        with self._warming():
            self._forward_backward(inputs, position)

    def update(self) -> Tensor:
        """Apply the gradients by the optimiser's learning rates; return numbers (N,) in float64 on the device.

        They are the sums over the micro-batches of what `names` says, the norm of the gradients, and the scale of the loss
        before and after the step. A later step may overwrite them.
        """
        parallel.average_gradients(self.task, self.world)
        graphs = self._current
        if not self._replayed or graphs is None or self.recorder is None:
            if graphs is not None:
                graphs.eager_steps += 1
            with self._warming():
                return self._apply()
        if graphs.update is None:
            graphs.update = self.recorder.record(self._apply)
            _log.info("graph: steps are recorded, in %.0f MiB", self.recorder.memory_bytes / 2**20)
        graphs.update.replay()
        return graphs.update.output

    def _find(self, key: Any) -> Graphs | None:
        """Return the graphs of a shape, None if it gets none."""
        if self.recorder is None:
            return None
        if key not in self._graphs and len(self._graphs) < MAX_SHAPES:
            self._graphs[key] = Graphs()
        return self._graphs.get(key)

    def _warming(self) -> AbstractContextManager[object]:
        """Return the context of eager work."""
        return nullcontext() if self.recorder is None else self.recorder.warming()

    def _replay(self, graphs: Graphs, position: int, inputs: tuple[Tensor, ...]) -> bool:
        """Run forward and backward as a graph, which is recorded if there is none yet; return False if that is impossible."""
        if not graphs.inputs:
            graphs.inputs = tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)
        recording = graphs.further if position else graphs.first
        if recording is None:
            if not position:
                self.optimizer.zero_grad()  # so that this backward makes the gradients
            try:
                assert self.recorder is not None
                recording = self.recorder.record(lambda: self._forward_backward(graphs.inputs, position))
            except RuntimeError as error:
                if self.config.graph == "on":
                    raise
                _log.warning("graph: steps are eager, since a graph could not be recorded: %s", error)
                self.recorder = self._current = None
                self._graphs.clear()
                return False
            if position:
                graphs.further = recording
            else:
                graphs.first, graphs.gradients = recording, [p.grad for p in self._parameters]
                self._holders = graphs
        if self._holders is not graphs:  # a step of another shape came between
            for parameter, gradient in zip(self._parameters, graphs.gradients, strict=True):
                parameter.grad = gradient
            self._holders = graphs
        for static, x in zip(graphs.inputs, inputs, strict=True):
            static.copy_(x)
        recording.replay()
        self._sums = recording.output
        return True

    def _forward_backward(self, inputs: tuple[Tensor, ...], position: int) -> Tensor:
        """Add the gradients of a micro-batch; return the sums of loss and metrics (N,) so far."""
        parallel.set_gradient_sync(self.task, last=position + 1 == self.micro_batches)
        with self.autocast():
            loss, metrics = self.task(*inputs)
        self.scaler.scale(loss / self.config.accumulate).backward()
        self.names = ("loss", *metrics)
        values = torch.stack([x.detach().to(loss.dtype) for x in (loss, *metrics.values())])
        self._sums = self._sums.add_(values) if position else values
        return self._sums

    def _apply(self) -> Tensor:
        """Clip the gradients, take the optimiser's step and update the EMA; return the numbers of `update`."""
        self.scaler.unscale_(self.optimizer)
        limit, gradients = self.config.optim.clip_grad, [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, limit, norm)
        norm = parallel.full_tensor(norm)
        one = torch.ones((), device=self.world.device)
        before = self.scaler.scale(one)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update()
        numbers = torch.stack([x.to(torch.float64) for x in (norm, before, self.scaler.scale(one))])
        return torch.cat((self._sums.to(torch.float64), numbers))
