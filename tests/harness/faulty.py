"""Operators with one fault each, for the checks to find; `scan` has none."""

import functools

import torch
from torch import Tensor

import fused

scan = functools.partial(fused.selective_scan, backend="torch")


class _Backward(torch.autograd.Function):
    """y unchanged; its cotangent goes through a function."""

    @staticmethod
    def forward(ctx, y, function):
        ctx.function = function
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return ctx.function(dy), None


def leaks_from_neighbours(u, *args, **options):
    """A clip's y has a trace of the clip before."""
    y, state = scan(u, *args, **options)
    return y + 1e-6 * y.detach().roll(1, 0) * (u.shape[0] > 1), state


def multiplies_neighbours_by_zero(u, *args, **options):
    """A mask where a NaN of another clip comes through."""
    y, state = scan(u, *args, **options)
    return y, state + 0 * y.detach().sum()


def leaves_the_last_unwritten(*args, **options):
    """y's last element stays what memory held."""
    y, state = scan(*args, **options)
    hole = torch.zeros_like(y, dtype=torch.bool)
    hole.view(-1)[-1] = True
    return torch.where(hole, torch.empty_like(y), y), state


def hides_what_is_unwritten(*args, **options):
    """The same, NaN taken for 0."""
    y, state = leaves_the_last_unwritten(*args, **options)
    return y.nan_to_num(), state


def writes_beside(*args, **options):
    """One element after y's own, where the memory is there."""
    y, state = scan(*args, **options)
    out = torch.empty(y.shape, dtype=y.dtype)
    end = out.storage_offset() + out.numel()
    if out.untyped_storage().nbytes() > end * out.element_size():
        out.as_strided((1,), (1,), end).fill_(0)
    return y + 0 * out.copy_(y.detach()), state


def overwrites_cotangent(*args, **options):
    """The backward scales dy where it lies."""
    y, state = scan(*args, **options)
    return _Backward.apply(y, lambda dy: dy.add_(0.25) - 0.25), state


_kept: list[Tensor] = []


def remembers_the_last_call(*args, **options):
    """Scratch that is kept from call to call, and not cleared."""
    y, state = scan(*args, **options)
    y = y + 0 * _kept.pop() if _kept and _kept[0].shape == y.shape else y
    _kept[:] = [y.detach()]
    return y, state


def reads_dense_cotangents(*args, **options):
    """The backward takes dy for contiguous."""

    def misread(dy: Tensor) -> Tensor:
        start, dense = dy.storage_offset(), torch.empty(dy.shape, device="meta").stride()
        room = dy.untyped_storage().nbytes() >= (start + dy.numel()) * dy.element_size()
        return dy.as_strided(dy.shape, dense, start) if room else dy

    y, state = scan(*args, **options)
    return _Backward.apply(y, misread), state


MOST = 2**16  # values that `counts_too_short` can count


def counts_too_short(*args, **options):
    """Addresses of y beyond MOST begin at 0 again."""
    y, state = scan(*args, **options)
    flat = y.reshape(-1)
    return torch.cat([flat[:MOST], flat[: max(0, flat.numel() - MOST)]]).view_as(y), state


def swallows_nan(u, *args, **options):
    """u's NaN is taken for 0."""
    return scan(u.nan_to_num(), *args, **options)


def drifts(u, delta, A, *args, **options):
    """Forgets a little faster than it should."""
    return scan(u, delta, A * (1 + 1e-4), *args, **options)


def conv_that_breaks_the_graph(*args, **options):
    """A convolution that looks at a value, which a graph cannot."""
    y, state = fused.causal_conv1d(*args, **options, backend="torch")
    return (y if float(y.detach().sum()) != 0.5 else -y), state


_calls = [0]


def changes_with_every_call(*args, **options):
    """The device that was asked before is no longer served as it was."""
    _calls[0] += 1
    y, state = scan(*args, **options)
    return y * (1 + 1e-3 * _calls[0]), state


def in_processes():
    """For the check `processes`: DDP never adds gradients up, and FSDP2 goes on without the optimiser's moments."""
    from fused.train import checkpoints, loop, parallel, step

    load = checkpoints.load

    def forgetful(checkpoint, model, optimizer, *more):
        load(checkpoint, model, optimizer, *more)
        if isinstance(model, torch.distributed.fsdp.FSDPModule):
            optimizer.state.clear()

    assert step.parallel is parallel and loop.checkpoints is checkpoints
    parallel.average_gradients, checkpoints.load = lambda task, world: None, forgetful


def conv_compiled_for_three_clips(x, *args, **options):
    """Compiled again where a batch is larger than three clips."""
    y, state = fused.causal_conv1d(x, *args, backend="torch", **options)
    return (y if x.shape[0] > 3 else y * 1.0), state


def conv_wrong_in_inference(x, *args, **options):
    """Wrong by a hundredth where it is compiled without gradients."""
    y, state = fused.causal_conv1d(x, *args, backend="torch", **options)
    return (y if torch.is_grad_enabled() or not torch.compiler.is_compiling() else y * 1.01), state
