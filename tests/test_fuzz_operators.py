"""Operators on anything: sizes, layouts, options, cuts and states drawn by hypothesis, and arguments that do not fit.

In float64 outputs and gradients are those of the reference; in other dtypes they have the form that is promised.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from fuzzing import DTYPES, HOSTILE, LAYOUTS, SEEDS, SIZES, examples, near
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fused
import reference

pytestmark = pytest.mark.usefixtures("unchecked")  # own checks are asked, not those of signatures


class Drawn(NamedTuple):
    """An operator's arguments: tensors in float64 by name, which of them stay precise, options."""

    name: str
    tensors: dict[str, Tensor]
    precise: tuple[str, ...]
    options: dict[str, Any]
    time: tuple[str, ...] = ()  # the tensors with tokens on axis 1


def normal(seed: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def some(draw: st.DrawFn, tensors: dict[str, Tensor], *optional: str) -> dict[str, Tensor]:
    """Leave some of the optional ones out."""
    kept = {name for name in optional if draw(st.booleans())}
    return {name: x for name, x in tensors.items() if name in kept or name not in optional}


@st.composite
def scans(draw: st.DrawFn) -> Drawn:
    B, E, N, G = draw(SIZES), draw(SIZES), draw(SIZES), draw(st.integers(0, 3))
    L = draw(st.sampled_from([1, 2, 3, 15, 16, 17, 33]))
    if G:
        E *= G
    mixing = (B, L, G, N) if G else (B, L, N)
    shapes = dict.fromkeys(("u", "delta", "z"), (B, L, E)) | dict.fromkeys("BC", mixing)
    made = normal(draw(SEEDS), **shapes, A=(E, N), D=(E,), delta_bias=(E,), initial_state=(B, E, N))
    made["A"] = -made["A"].exp()
    options = {"softplus": draw(st.booleans()), "reverse": draw(st.booleans())}
    if not options["softplus"]:
        made["delta"] = made["delta"].abs()
        made.pop("delta_bias")
    made = some(draw, made, "D", "z", "delta_bias", "initial_state")
    return Drawn("selective_scan", made, ("A", "D", "delta_bias", "initial_state"), options, ("u", "delta", "B", "C", "z"))


@st.composite
def convolutions(draw: st.DrawFn) -> Drawn:
    B, E, K = draw(SIZES), draw(SIZES), draw(SIZES)
    L = draw(st.sampled_from([0, 1, 2, 3, 4, 9]))
    made = normal(draw(SEEDS), x=(B, L, E), weight=(E, K), bias=(E,), initial_state=(B, E, K - 1))
    options = {"activation": draw(st.sampled_from([None, "silu"])), "reverse": draw(st.booleans())}
    return Drawn("causal_conv1d", some(draw, made, "bias", "initial_state"), ("weight", "bias"), options, ("x",))


@st.composite
def norms(draw: st.DrawFn) -> Drawn:
    lead, D = tuple(draw(st.lists(st.integers(0, 4), max_size=3))), draw(st.integers(1, 9))
    made = some(draw, normal(draw(SEEDS), x=(*lead, D), weight=(D,), bias=(D,), residual=(*lead, D)), "bias", "residual")
    options = {
        "kind": draw(st.sampled_from(["rms", "layer"])), "prenorm": draw(st.booleans()),
        "residual_in_fp32": draw(st.booleans()), "eps": draw(st.sampled_from([1e-5, 0.3])),
    }  # fmt: skip
    return Drawn("add_norm", made, ("weight", "bias"), options)


@st.composite
def ssds(draw: st.DrawFn) -> Drawn:
    B, P, N, G = draw(SIZES), draw(SIZES), draw(SIZES), draw(st.integers(1, 2))
    H, L = G * draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 65]))
    D = draw(st.sampled_from([(H,), (H, P)]))
    shapes = {"x": (B, L, H, P), "dt": (B, L, H), "A": (H,), "B": (B, L, G, N), "C": (B, L, G, N), "D": D, "z": (B, L, H, P)}
    made = normal(draw(SEEDS), **shapes, dt_bias=(H,), initial_state=(B, H, P, N))
    made["A"] = -made["A"].exp()
    options = {"softplus": draw(st.booleans()), "reverse": draw(st.booleans())}
    if not options["softplus"]:
        made["dt"] = made["dt"].abs()
        made.pop("dt_bias")
    elif draw(st.booleans()):
        options["dt_limit"] = (0.02, 0.3)
    made = some(draw, made, "D", "z", "dt_bias", "initial_state")
    return Drawn("ssd", made, ("initial_state",), options, ("x", "dt", "B", "C", "z"))


OPERATORS = {"scan": scans(), "conv": convolutions(), "norm": norms(), "ssd": ssds()}


def results(package: Any, drawn: Drawn, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    own = {"backend": "torch"} if package is fused else {}
    found = getattr(package, drawn.name)(**tensors, **drawn.options, **own)
    return found if isinstance(found, tuple) else (found,)


def differentiated(package: Any, drawn: Drawn, place: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients in float64, of tensors in a layout."""
    leaves = {name: x.clone().requires_grad_() for name, x in drawn.tensors.items()}
    outputs = results(package, drawn, {name: place(x) for name, x in leaves.items()})
    total = sum((y * (1 + torch.arange(y.numel()).view(y.shape) % 7)).sum() for y in outputs)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    if isinstance(total, Tensor) and total.requires_grad:
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        zeros = (torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves.values(), strict=True))
        found |= {f"grad {name}": g for name, g in zip(leaves, zeros, strict=True)}
    return found


@pytest.mark.parametrize("name", OPERATORS)
def test_values_and_gradients(name: str) -> None:
    @examples(0.5)
    @given(OPERATORS[name], st.sampled_from(LAYOUTS))
    def run(drawn: Drawn, place: Callable[[Tensor], Tensor]) -> None:
        due = differentiated(reference, drawn, lambda x: x)
        got = differentiated(fused, drawn, place)
        assert got.keys() == due.keys()
        for tensor in due:
            near(tensor, got[tensor], due[tensor])

    run()


@pytest.mark.parametrize("name", OPERATORS)
def test_form_in_any_dtype(name: str) -> None:
    @examples(0.5)
    @given(OPERATORS[name], DTYPES, st.sampled_from(LAYOUTS))
    def run(drawn: Drawn, dtype: torch.dtype, place: Callable[[Tensor], Tensor]) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        given_in = {name: x.to(wide if name in drawn.precise else dtype) for name, x in drawn.tensors.items()}
        due = results(reference, drawn, given_in)
        got = results(fused, drawn, {name: place(x) for name, x in given_in.items()})
        assert [(y.shape, y.dtype) for y in got] == [(y.shape, y.dtype) for y in due]
        assert all(bool(y.isfinite().all()) for y in got)

    run()


@pytest.mark.parametrize("name", ["scan", "conv", "ssd"])
def test_cut_anywhere_and_chained_by_the_state(name: str) -> None:
    @examples(0.5)
    @given(OPERATORS[name], st.floats(0, 1))
    def run(drawn: Drawn, share: float) -> None:
        whole = results(fused, drawn, drawn.tensors)
        length = whole[0].shape[1]
        place = int(share * length)
        if name == "ssd" and not 0 < place < length:
            return  # it takes no empty part
        parts = [slice(place), slice(place, None)]
        ys, state = [], drawn.tensors.get("initial_state")
        for part in parts[::-1] if drawn.options["reverse"] else parts:
            tensors = {k: x[:, part] if k in drawn.time else x for k, x in drawn.tensors.items()}
            carried = {} if state is None else {"initial_state": state}
            y, state = results(fused, drawn, tensors | carried)
            ys.append(y)
        near("y", torch.cat(ys[::-1] if drawn.options["reverse"] else ys, 1), whole[0])
        near("state", state, whole[1])

    run()


@pytest.mark.parametrize("name", OPERATORS)
def test_what_does_not_fit_is_named(name: str) -> None:
    """TypeError or ValueError that begins with the operator's name and has an argument's, whatever one of them is."""

    @examples(0.5)
    @given(OPERATORS[name], st.data())
    def run(drawn: Drawn, data: st.DataObject) -> None:
        wrong = data.draw(st.sampled_from(sorted(drawn.tensors)))
        x = drawn.tensors[wrong]
        wider = torch.cat((x, x), -1)[..., : x.shape[-1] + 1] if x.shape[-1] else None
        bad: list[Any] = [x[None, None], wider, x.long(), x.bool(), x.to(torch.complex128), x.to("meta"), x.tolist(), "x", 1.5]
        value = data.draw(st.sampled_from([b for b in bad if b is not None]))
        if isinstance(value, Tensor) and value.shape == x.shape and value.dtype == x.dtype and value.device == x.device:
            return
        try:
            results(fused, drawn, drawn.tensors | {wrong: value})
        except (TypeError, ValueError) as error:
            assert str(error).startswith(drawn.name), error
            assert any(known in str(error) for known in drawn.tensors), error
        else:
            tied = ("z", "initial_state") if name == "ssd" else ("initial_state",)  # by the size that one of them has alone
            free = {"norm": ("x", "residual"), "conv": ("weight",), "ssd": ("x",), "scan": ()}[name]
            channels = name == "ssd" and "D" in drawn.tensors and drawn.tensors["D"].dim() == 2
            assert wrong in free and not drawn.tensors.keys() & set(tied) and not channels, f"{wrong} as {value!r:.100}"

    run()


@pytest.mark.parametrize("name", OPERATORS)
def test_wrong_options(name: str) -> None:
    @examples(0.2)
    @given(OPERATORS[name], st.sampled_from(["kind", "activation", "backend", "dt_limit"]), st.sampled_from(HOSTILE))
    def run(drawn: Drawn, option: str, value: Any) -> None:
        if option != "backend" and option not in drawn.options:
            return
        try:
            results(fused, drawn._replace(options=drawn.options | {option: value}), drawn.tensors) if option != "backend" else (
                getattr(fused, drawn.name)(**drawn.tensors, **drawn.options, backend=value)
            )
        except (TypeError, ValueError) as error:
            assert option in str(error), error

    run()
