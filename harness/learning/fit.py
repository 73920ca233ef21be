"""The training of one model on one task, and its test on held-out data."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused
from fused.train import cosine_schedule, parameter_groups, setup_seed
from harness.learning.task import Data, Recipe, Task

EVALUATIONS = 10  # of a training
SMOOTHING, WEIGHT_DECAY, CLIPPED = 0.1, 0.05, 1.0  # labels, AdamW, norm of the gradient
EVALUATION_BATCH = 256  # held-out clips a forward


@dataclass(frozen=True)
class Evaluation:
    """An evaluation after `step` steps: mean loss since the one before, wrong held-out answers, seconds of training so far."""

    step: int
    loss: float
    wrong: int
    seconds: float


@dataclass
class Fitted:
    """A trained model, its evaluations, the loss of each step, and the number of held-out answers."""

    model: nn.Module
    num_held_out: int
    evaluations: list[Evaluation] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def fit(
    task: Task, data: Data, build: Callable[[dict[str, Any]], Any], recipe: Recipe, seed: int, device: str,
    tell: Callable[[Evaluation], None] = lambda evaluation: None,
) -> Fitted:  # fmt: skip
    """Train `build(task.config)`, a VideoMamba of either package, on a device; `tell` is called with each of its evaluations.

    The seed gives the initial weights, the same for all implementations, and the batches, which are drawn on the CPU.
    Settings of the process become those of `setup_seed`; a training repeats bit for bit on the same machine.
    """
    setup_seed(seed)
    twin = fused.VideoMamba(fused.VideoMambaConfig(**task.config))
    model = build(task.config).to(device)
    model.load_state_dict(twin.state_dict(), strict=True)
    optimizer = torch.optim.AdamW(_groups(twin, model, recipe.lr), betas=(0.9, 0.95))

    def loss(generator: torch.Generator) -> Tensor:
        inputs, classes = (x.to(device) for x in data.draw(generator, recipe.batch))
        return F.cross_entropy(model.train()(inputs).float(), classes, label_smoothing=SMOOTHING)

    fitted = Fitted(model, len(data.held_out[1]))
    take_steps(fitted, optimizer, recipe.steps, seed, loss, lambda: count_wrong(model, *data.held_out), tell)
    return fitted


def take_steps(
    fitted: Fitted, optimizer: torch.optim.Optimizer, steps: int, seed: int, draw_loss: Callable[[torch.Generator], Tensor],
    wrong: Callable[[], int], tell: Callable[[Evaluation], None],
) -> None:  # fmt: skip
    """Train the model of `fitted`, and note losses and evaluations there.

    A step minimises `draw_loss` of a generator on the CPU; `wrong` counts the wrong held-out answers.
    """
    model, schedule = fitted.model, cosine_schedule(optimizer, steps, steps // 10, floor=0.01)
    generator = torch.Generator().manual_seed(seed)
    marks, spent, since = evaluation_steps(steps), 0.0, 0
    for step in range(1, steps + 1):
        begin = time.perf_counter()
        loss = draw_loss(generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIPPED)
        optimizer.step()
        schedule.step()
        fitted.losses.append(loss.item())
        spent += time.perf_counter() - begin
        if step in marks:
            mean = math.fsum(fitted.losses[since:]) / (step - since)
            fitted.evaluations.append(Evaluation(step, mean, wrong(), spent))
            since = step
            tell(fitted.evaluations[-1])


def evaluation_steps(steps: int) -> list[int]:
    """Return the steps after which a training is evaluated, the last among them."""
    return sorted({round(steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)} - {0})


def count_wrong(model: nn.Module, inputs: Tensor, classes: Tensor) -> int:
    """Return how many answers are wrong. A model that gives NaN gives no answer."""
    return int((_answers(model, inputs) != classes).sum())


def _answers(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the classes (N,) that a model gives to inputs (N, ...), -1 where it gives no finite logits."""
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = torch.cat([model.eval()(part.to(device)).float().cpu() for part in inputs.split(EVALUATION_BATCH)])
    return torch.where(logits.isfinite().all(dim=1), logits.argmax(dim=1), -1)


def _groups(twin: nn.Module, model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Return the groups that `parameter_groups` makes for `twin`, of fused's classes, with the parameters of `model`."""
    names = {id(p): name for name, p in twin.named_parameters()}
    parameters = dict(model.named_parameters())
    groups = parameter_groups(twin, lr, WEIGHT_DECAY, rule="corrected")
    return [group | {"params": [parameters[names[id(p)]] for p in group["params"]]} for group in groups]
