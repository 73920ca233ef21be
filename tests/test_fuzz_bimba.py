"""BIMBA's compressor on anything: sizes, options, layouts and cuts drawn by hypothesis, and arguments that do not fit.

In float64 results and gradients are those of the reference, and chunks give what the whole gives.
"""

from typing import Any, NamedTuple

import pytest
import torch
from fuzzing import HOSTILE, LAYOUTS, SEEDS, examples, near
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fused
import reference

COUNTS = ("d_model", "n_layer", "d_state", "d_conv", "expand")
FLAGS = ("bimamba", "use_norm", "use_res", "multi_scale", "fp32")


pytestmark = pytest.mark.usefixtures("unchecked")  # own checks are asked, not those of signatures


class Drawn(NamedTuple):
    """A compressor of the reference, the same of `fused`, and what they are given, all in float64."""

    truth: Any
    found: Any
    tokens: Tensor
    queries: Tensor


@st.composite
def compressors(draw: st.DrawFn, chunked: bool = False) -> Drawn:
    """Draw ratios whole and broken, grids that are no squares, more queries than tokens, one query, batches, every option."""
    options: dict[str, Any] = {name: draw(st.booleans()) for name in FLAGS}
    options |= {"d_model": draw(st.sampled_from([4, 8])), "expand": draw(st.sampled_from([2, 4]))}
    options |= {"d_state": draw(st.integers(1, 5)), "d_conv": draw(st.integers(1, 5))}
    options["initial_values"] = draw(st.sampled_from(["upstream", "corrected"]))
    if not chunked:
        options |= {"n_layer": draw(st.integers(1, 3)), "mixer_type": draw(st.sampled_from(["mamba", "mamba", "attention"]))}
    B, F, H, W = draw(st.integers(1, 2)), draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    G, Q = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5, 20]))
    torch.manual_seed(draw(SEEDS))
    truth, found = reference.BimbaCompressor(**options).double(), fused.BimbaCompressor(**options, backend="torch").double()
    found.load_state_dict(truth.state_dict())
    given = torch.randn(B, F, H, W, options["d_model"]).double(), torch.randn(B, G, Q, options["d_model"]).double()
    return Drawn(truth, found, *given)


def differentiated(module: Any, run: Any, *given: Tensor) -> dict[str, Tensor]:
    """Return the output of `run` and the gradients of what it is given and of all parameters."""
    leaves = [x.clone().requires_grad_() for x in given]
    named = dict(module.named_parameters())
    out = run(*leaves)
    weights = 1 + torch.arange(out.numel(), dtype=out.dtype).view(out.shape) % 7
    grads = torch.autograd.grad((out * weights).sum(), [*leaves, *named.values()], allow_unused=True)
    names = ["tokens", "queries", *named]
    return {"out": out.detach()} | {n: torch.zeros(0).double() if g is None else g for n, g in zip(names, grads, strict=True)}


@examples(0.5)
@given(compressors(), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
def test_results_and_gradients_are_the_references(drawn: Drawn, of_tokens: Any, of_queries: Any) -> None:
    due = differentiated(drawn.truth, drawn.truth, drawn.tokens, drawn.queries)
    run = lambda t, q: drawn.found(of_tokens(t), of_queries(q))  # noqa: E731
    for name, x in differentiated(drawn.found, run, drawn.tokens, drawn.queries).items():
        near(name, x, due[name])


@examples(0.5)
@given(compressors(chunked=True), st.data())
def test_chunks_at_any_frames_give_what_the_whole_gives(drawn: Drawn, data: st.DataObject) -> None:
    """Also where a chunk has no query, or no frame at all."""
    frames = drawn.tokens.shape[1]
    cuts = sorted(data.draw(st.lists(st.integers(0, frames), max_size=4)))
    sizes = [end - start for start, end in zip([0, *cuts], [*cuts, frames], strict=True)]
    longest = data.draw(st.none() | st.integers(1, 7))
    chunked = drawn.found.forward_chunked
    run = lambda t, q: chunked(iter(t.split(sizes, dim=1)), q, chunk_frames=longest)  # noqa: E731
    due = differentiated(drawn.found, drawn.found, drawn.tokens, drawn.queries)
    for name, x in differentiated(drawn.found, run, drawn.tokens, drawn.queries).items():
        near(name, x, due[name])
    with torch.no_grad():
        near("inference", run(drawn.tokens, drawn.queries), due["out"])


@examples()
@given(st.sampled_from(COUNTS), st.sampled_from(HOSTILE))
def test_sizes_are_built_or_refused_with_their_name(name: str, value: Any) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return
    for package in (reference, fused):
        with pytest.raises((TypeError, ValueError), match=name):
            package.BimbaCompressor(**{"d_model": 8, name: value})


@examples()
@given(st.sampled_from(["tokens", "queries", "chunk"]), st.sampled_from(HOSTILE))
def test_what_is_no_tensor_of_numbers_is_refused_with_its_name(name: str, value: Any) -> None:
    compressor, tokens, queries = fused.BimbaCompressor(8), torch.randn(1, 2, 2, 2, 8), torch.randn(1, 1, 3, 8)
    with pytest.raises((TypeError, ValueError), match="queries" if name == "queries" else "tokens"):
        if name == "chunk":
            compressor.forward_chunked(iter([tokens, value]), queries)
        else:
            compressor(**{"tokens": tokens, "queries": queries} | {name: value})
    with pytest.raises((TypeError, ValueError), match="features"):
        fused.bimba_queries(value)
