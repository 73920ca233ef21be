"""The norm that writes tokens and queries as one sequence against the norm of each: on a GPU, or interpreted on the CPU."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="the norm's kernels are Triton's")

from fused.models.bimba.interleave import insert, places_of  # noqa: E402
from fused.models.bimba.layer import norm_and_insert  # noqa: E402
from fused.modules.norm import Norm  # noqa: E402

SIZES = [(2, 13, 4, 8), (1, 24, 3, 40), (2, 3, 7, 64), (3, 1, 1, 16), (1, 300, 1, 20)]  # clips, tokens, queries, width


def inputs(clips, num_tokens, num_queries, width, dtype):
    torch.manual_seed(0)
    norm = Norm(width, 1e-6).to(DEVICE)
    with torch.no_grad():
        norm.weight.normal_()
    tokens, queries = (torch.randn(clips, n, width).to(DEVICE, dtype) for n in (num_tokens, num_queries))
    return norm, tokens, queries, places_of(num_tokens, num_queries, torch.device(DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rows_have_the_bits_of_the_norm_of_each(sizes, dtype):
    norm, tokens, queries, places = inputs(*sizes, dtype)
    with torch.no_grad():
        sequence, readers = norm_and_insert(norm, tokens, queries, places, "native")
        due = insert(norm(tokens, "native"), norm(queries, "native"), places)
    assert sequence.dtype == dtype and torch.equal(sequence, due)
    assert torch.equal(readers, norm(queries, "native"))


def test_inputs_of_any_layout_are_read():
    norm, tokens, queries, places = inputs(2, 12, 3, 8, torch.float32)
    with torch.no_grad():
        due = norm_and_insert(norm, tokens, queries, places, "native")[0]
        strided = tokens.mT.contiguous().mT, queries.repeat(1, 1, 2)[..., :8]
        assert torch.equal(norm_and_insert(norm, *strided, places, "native")[0], due)


def test_a_hook_of_the_norm_is_called_and_gradients_flow():
    norm, tokens, queries, places = inputs(1, 6, 2, 8, torch.float32)
    sequence = norm_and_insert(norm, tokens.requires_grad_(), queries, places, "native")[0]
    sequence.sum().backward()
    assert tokens.grad is not None and norm.weight.grad is not None
    norm.register_forward_hook(lambda module, args, y: 2 * y)
    with torch.no_grad():
        assert torch.equal(norm_and_insert(norm, tokens, queries, places, "native")[0], 2 * sequence)
