"""What the subjects that are modules share: precision, parameters in a trained model's range, calls without module state."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from harness.case import Case
from harness.subjects.scan import delta_bias


def precisions(shapes_and_options: list[tuple[dict[str, int], tuple[str, ...]]], subject: str, half: bool) -> list[Case]:
    """Every case in float32 and in bfloat16 under autocast; `half` adds float16 and bfloat16 parameters (`cast`)."""
    ways = [("float32", ()), ("bfloat16", ("autocast",))]
    if half:
        ways += [("float16", ("autocast",)), ("bfloat16", ("cast",))]
    return [Case(subject, tuple(s.items()), (*o, *way), dtype) for s, o in shapes_and_options for dtype, way in ways]


def parameters(module: nn.Module, case: Case, seed: int) -> dict[str, Tensor]:
    """Values for every parameter: weights of unit gain, everything else off its initial value, so that no term is idle."""
    drawn = {}
    for name, p in module.named_parameters():
        leaf, shape = name.rpartition(".")[2], tuple(p.shape)
        noise = case.normal(seed, name, *shape)
        if leaf in ("A_log", "A_b_log"):
            drawn[name] = torch.arange(1, shape[1] + 1, dtype=torch.float64).log() + 0.1 * noise
        elif name.endswith(("dt_proj.bias", "dt_proj_b.bias")):
            drawn[name] = delta_bias(case, seed, name, shape[0])
        elif leaf in ("D", "D_b") or (leaf == "weight" and len(shape) == 1):
            drawn[name] = 1 + 0.1 * noise
        elif leaf == "bias":
            drawn[name] = 0.1 * noise
        elif leaf == "weight":
            drawn[name] = noise / (p.numel() / shape[0]) ** 0.5
        else:
            drawn[name] = 0.5 * noise
    return drawn


def precise(case: Case, module: nn.Module, inputs: set[str], states: set[str]) -> set[str]:
    """Under `cast` parameters and inputs are rounded; otherwise both stay float32 and autocast does the rounding."""
    if case.has("cast"):
        return states
    return {name for name, _ in module.named_parameters()} | inputs | states


@contextlib.contextmanager
def precision(case: Case, leaves: dict[str, Tensor]) -> Iterator[None]:
    """Autocast where the case says so; never for the truth, whose leaves are float64."""
    leaf = next(iter(leaves.values()))
    on = case.has("autocast") and leaf.dtype != torch.float64
    with torch.autocast(leaf.device.type, dtype=case.torch_dtype, enabled=on):
        yield


@functools.lru_cache(maxsize=32)
def on_meta(build: Callable[..., nn.Module], call: Callable[..., Any], case: Case) -> nn.Module:
    """The module of a case without memory for its parameters, which come from the leaves."""
    with torch.device("meta"):
        return build(call, case)


class _Method(nn.Module):
    """Calls a function of a module instead of its forward, so that `functional_call` can give it other parameters."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args: Any) -> Any:
        return self.function(self.module, *args)


def call(module: nn.Module, leaves: dict[str, Tensor], function: Callable[..., Any], *args: Any) -> Any:
    """function(module, *args) with the leaves as the module's parameters; the module itself may be on "meta"."""
    names = [name for name, _ in module.named_parameters()]
    values = {f"module.{name}": leaves[name] for name in names}
    return _call(_Method(module, function), values, args)


def _call(method: nn.Module, values: dict[str, Tensor], args: tuple[Any, ...]) -> Any:
    return torch.func.functional_call(method, values, args, strict=True)


State = Any  # tensors in lists, tuples and dicts


def chained(
    step: Callable[[int, int, State], tuple[Any, State]], cuts: tuple[int, ...], count: int, state: State
) -> tuple[list[Any], State]:
    """Outputs of step(start, stop, state) -> (output, state) for all chunks, and the last state.

    Autocast forgets its rounded weights in between, as if it were entered once a chunk: else it sums their gradients over the
    chunks in half precision. Raises AssertionError for a step that writes to the state that came, which has to serve again.
    """
    outputs = []
    for start, stop in zip(cuts, (*cuts[1:], count), strict=True):
        torch.clear_autocast_cache()
        came = [x for x in tree_leaves(state) if isinstance(x, Tensor)]
        kept = [x.detach().clone() for x in came]
        out, after = step(start, stop, state)
        if not all(torch.allclose(x, was, rtol=0, atol=0, equal_nan=True) for x, was in zip(came, kept, strict=True)):
            raise AssertionError(f"the chunk from {start} to {stop} wrote to the state that came with it")
        outputs.append(out)
        state = after
    return outputs, state


def refuses(step: Callable[[int, int, State], Any], start: int, stop: int, state: State) -> None:
    """Raise AssertionError unless a step raises ValueError for a state of one clip too many."""
    crowded = tree_map(lambda x: torch.cat((x, x[:1])) if x.dim() else x, state)
    try:
        step(start, stop, crowded)
    except ValueError:
        return
    raise AssertionError(f"the chunk from {start} to {stop} took a state of other clips")


@contextlib.contextmanager
def compiled(backend: str) -> Iterator[None]:
    """With every `call` of a module compiled as one graph."""
    with mock.patch(f"{__name__}._call", torch.compile(_call, fullgraph=True, backend=backend)):
        yield
