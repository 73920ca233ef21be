"""Operators that `register` differentiates by their backward operator."""

import itertools
import re

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fused.runtime.library import register

_numbers = itertools.count()


def weighted_squares(calls):
    """Return a new operator: x + sum_i w_i b_i^2 times `factor`, and the sum of its squares; `table` has no gradient.

    It keeps the squares of the b_i, as a list. `calls` gets which gradients the backward receives.
    """

    def forward(x, b, weight, table, factor, keep):
        squares = [y.square() for y in b if y is not None]
        y = x + sum(w * s for w, s in zip(weight, squares, strict=True)) * factor + table.sum()
        return y, y.square().sum(), squares if keep else [], None

    def forward_shapes(x, b, weight, table, factor, keep):
        kept = [y.new_empty(y.shape) for y in b if y is not None] if keep else []
        return x.new_empty(x.shape), x.new_empty(()), kept, x.new_empty(0)

    def backward(x, b, weight, table, factor, squares, nothing, dy, dnorm):
        calls.append((dy is not None, dnorm is not None, len(squares), nothing))
        y = x + sum(w * s for w, s in zip(weight, squares, strict=True)) * factor + table.sum()
        total = torch.zeros_like(x) if dy is None else dy
        total = total if dnorm is None else total + 2 * y * dnorm
        places = iter(weight)
        db = [None if y is None else 2 * y * next(places) * factor * total for y in b]
        return total.clone(), db, [(s * factor * total).sum() for s in squares]

    def backward_shapes(x, b, weight, table, factor, squares, nothing, dy, dnorm):
        db = [x.new_empty(0 if y is None else y.shape) for y in b]
        return x.new_empty(x.shape), db, [w.new_empty(()) for w in weight]

    name = f"test_weighted_squares_{next(_numbers)}"
    inputs = "Tensor x, Tensor?[] b, Tensor[] weight, Tensor table, float factor"
    gradients = register(
        f"{name}_backward({inputs}, Tensor[] squares, Tensor? nothing, Tensor? dy, Tensor? dnorm) "
        "-> (Tensor dx, Tensor[] db, Tensor[] dweight)",
        backward, backward_shapes,
    )  # fmt: skip
    schema = f"{name}({inputs}, bool keep) -> (Tensor y, Tensor norm, Tensor[] squares, Tensor nothing)"
    return register(schema, forward, forward_shapes, gradients), getattr(torch.ops.videomamba, name).default


def arguments():
    x, first, second = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = [torch.randn((), dtype=torch.float64, requires_grad=True) for _ in range(2)]
    return x, [first, None, second], weight, torch.ones(3, dtype=torch.float64)


def leaves_of(x, b, weight, table):
    return [x, b[0], b[2], *weight]


def by_pytorch(x, b, weight, table, factor):
    y = x + (weight[0] * b[0].square() + weight[1] * b[2].square()) * factor + table.sum()
    return y, y.square().sum()


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("dispatched", [False, True])
def test_gradients_are_those_of_the_backward_operator(wanted, dispatched):
    calls, given = [], arguments()
    run = weighted_squares(calls)[dispatched]
    results = run(*given, 0.5, True)
    assert [x.shape for x in results[2]] == [(5,), (5,)] and not any(x.requires_grad for x in results[2])
    due = by_pytorch(*given, 0.5)
    assert all(map(torch.equal, results[:2], due))
    pairs = [[torch.autograd.grad([outs[i].sum() for i in wanted], leaves_of(*given))] for outs in (results, due)]
    assert all(map(torch.allclose, *(pair[0] for pair in pairs)))
    assert [call[:3] for call in calls] == [(0 in wanted, 1 in wanted, 2)]


def test_it_is_an_operator_as_torch_wants_it():
    calls = []
    _, operator = weighted_squares(calls)
    torch.library.opcheck(operator, (*arguments(), 0.5, True))
    with torch.no_grad():
        assert operator(*arguments(), 0.5, False)[2] == []


def test_a_checkpoint_reads_what_is_saved_once():
    given = arguments()
    run, _ = weighted_squares([])
    y, _ = checkpoint(lambda: run(*given, 0.5, True)[:2], use_reentrant=False)
    got = torch.autograd.grad(y.sum(), leaves_of(*given))
    due = torch.autograd.grad(by_pytorch(*given, 0.5)[0].sum(), leaves_of(*given))
    assert all(map(torch.allclose, got, due))


class Stop(torch.autograd.Function):
    """An identity through which no gradient flows."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_where_no_gradient_arrives_none_is_returned():
    calls, given = [], arguments()
    y, norm, *_ = weighted_squares(calls)[0](*given, 0.5, True)
    found = torch.autograd.grad(Stop.apply(y).sum() + Stop.apply(norm), leaves_of(*given), allow_unused=True)
    assert found == (None,) * 5 and not calls


def test_one_result_and_one_gradient():
    schema = "test_cube_backward(Tensor x, Tensor dy) -> Tensor"
    backward = register(schema, lambda x, dy: 3 * x * x * dy, lambda x, dy: x.clone())
    cube = register("test_cube(Tensor x) -> Tensor", lambda x: x**3, lambda x: x.clone(), backward)
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = cube(x)
    assert torch.equal(y, x**3)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.allclose(dx, 3 * x * x)
    with pytest.raises(RuntimeError, match=re.escape("test_cube_backward: trying to differentiate twice")):
        dx.sum().backward()
