"""The fused compressor: sequences of tokens and queries, runs in chunks, wrapped modules, autocast."""

import weakref

import pytest
import torch
from golden import golden
from torch import nn

import reference
from fused import BimbaCompressor
from fused.models.bimba import chunked as chunks
from fused.models.bimba.interleave import extract, insert, interleave, places_between, places_of
from fused.models.bimba.query_mixer import mix_at_queries
from fused.modules.mamba import Mamba

CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes", [(12, 4), (13, 4), (1, 1), (3, 7), (1, 9), (29, 22)])
def test_a_sequence_and_its_parts(sizes):
    places = places_of(*sizes, CPU)
    tokens, queries = torch.randn(2, sizes[0], 3, requires_grad=True), torch.randn(2, sizes[1], 3, requires_grad=True)
    sequence = insert(tokens, queries, places)
    assert torch.equal(sequence[:, places.queries], queries) and torch.equal(sequence[:, places.tokens], tokens)
    weights = torch.randn_like(sequence)
    found = torch.autograd.grad((sequence * weights).sum(), (tokens, queries))
    assert torch.equal(found[0], weights[:, places.tokens]) and torch.equal(found[1], weights[:, places.queries])
    assert all(map(torch.equal, extract(sequence, places), (tokens, queries)))


@pytest.mark.parametrize("sizes", [(12, 4), (13, 4), (3, 7), (30, 2)])
def test_the_places_of_a_part(sizes):
    """Every query comes in the part of the token before it; parts joined are the whole sequence."""
    places, joined = interleave(*sizes), []
    tokens, queries = (torch.arange(float(size)).view(1, -1, 1) for size in sizes)
    for start in range(0, sizes[0], 5):
        end = min(start + 5, sizes[0])
        first, last, local = places_between(places, start, end, CPU)
        joined.append(insert(tokens[:, start:end], -queries[:, first:last], local))
    assert torch.equal(torch.cat(joined, 1), insert(tokens, -queries, places_of(*sizes, CPU)))


def compressor_and_inputs(frames=7, queries=9, **options):
    torch.manual_seed(0)
    compressor = golden(BimbaCompressor(8, d_state=4, **options))
    return compressor, torch.randn(2, frames, 2, 3, 8), torch.randn(2, 1, queries, 8)


def test_two_layers_without_residuals_are_the_references():
    _, *given = compressor_and_inputs()
    packages = reference.BimbaCompressor, BimbaCompressor
    compressors = [golden(package(8, d_state=4, n_layer=2, use_res=False)).double() for package in packages]
    torch.testing.assert_close(*(compressor(*(x.double() for x in given)) for compressor in compressors))


def test_the_gate_of_query_rows_is_rounded_once_in_half_precision():
    """Where z is 128 the gate is a power of two, so that the result shows y; out_proj hands on the first channels."""
    torch.manual_seed(0)
    mixer, places, tokens = golden(Mamba(16, d_state=4)).bfloat16(), places_of(24, 9, CPU), torch.randn(2, 33, 16).bfloat16()
    tokens[..., 0] = 1
    queries, weight_z = tokens[:, places.queries], mixer.in_proj.weight[32:].detach().clone()

    def with_gate(weight):
        mixer.in_proj.weight[32:] = weight
        return mix_at_queries(mixer, tokens, queries, places, "torch")

    with torch.no_grad():
        mixer.out_proj.weight.copy_(torch.eye(16, 32))
        y = with_gate(torch.tensor([128.0] + [0.0] * 15).expand(32, 16)).float() / 128
        z = torch.nn.functional.linear(queries, weight_z)[..., :16].float()
        assert torch.equal(with_gate(weight_z), (y * torch.nn.functional.silu(z)).bfloat16())


@pytest.mark.parametrize("queries", [1, 9, 14, 60])
@pytest.mark.parametrize("options", [{}, {"bimamba": False}, {"use_norm": False, "use_res": False}, {"fp32": True}], ids=str)
def test_chunks_give_what_the_whole_gives(queries, options):
    compressor, tokens, queries = compressor_and_inputs(queries=queries, **options)
    due = compressor(tokens, queries)
    for given in (
        compressor.forward_chunked(tokens, queries, chunk_frames=2),
        compressor.forward_chunked(iter(tokens.split([1, 4, 2], 1)), queries, offload=True),
        compressor.forward_chunked([tokens], queries),
        compressor.forward_chunked(iter([tokens]), queries, chunk_frames=3),
    ):
        assert given.shape == due.shape
        torch.testing.assert_close(given, due, rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_chunks():
    compressor, tokens, queries = compressor_and_inputs()
    leaves = [tokens.requires_grad_(), queries.requires_grad_(), *compressor.parameters()]
    due = torch.autograd.grad(compressor(tokens, queries).square().sum(), leaves)
    got = torch.autograd.grad(compressor.forward_chunked(tokens, queries, chunk_frames=3).square().sum(), leaves)
    for x, y in zip(got, due, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_layer": 2}, "n_layer must be 1, got 2"),
        ({"mixer_type": "attention"}, "attention has no state"),
        ({"backend": "mamba_ssm"}, "'mamba_ssm' carries no state"),
    ],
    ids=str,
)
def test_compressors_without_chunks_raise(options, words):
    with pytest.raises(ValueError, match=words):
        BimbaCompressor(8, **options).forward_chunked(torch.randn(1, 2, 2, 2, 8), torch.randn(1, 1, 1, 8), chunk_frames=1)


@pytest.mark.usefixtures("unchecked")
def test_chunks_that_do_not_fit_raise():
    compressor, tokens, queries = compressor_and_inputs()
    run = compressor.forward_chunked
    for words, given, options in (
        ("chunk_frames must be given", tokens, {}),
        ("chunk_frames must be .* got 0", tokens, {"chunk_frames": 0}),
        ("at least one chunk", iter([]), {}),
        (r"\(7, 2, 3, 8\)", [tokens[0]], {}),
        ("chunk 1 of tokens", [tokens, tokens[:, :, :1]], {}),
        ("tokens must have shape", [tokens[..., :6]], {}),
    ):
        with pytest.raises(ValueError, match=words):
            run(given, queries, **options)
    compressor.layers[0].mixer.x_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="x_proj of the mixer has 1 forward hook"):
        run(tokens, queries, chunk_frames=1)


@pytest.mark.usefixtures("unchecked")
def test_a_video_that_does_not_fit_is_refused_at_the_chunk_that_does_not():
    """What an iterator raises reaches the caller; chunks without a frame are none."""
    compressor, tokens, queries = compressor_and_inputs()
    for words, first, wrong in (
        ("queries must be torch.float64 like tokens, got torch.float32", tokens.double(), queries),
        (r"queries must have shape \(B, G, Q, C=8\), got \(2, 9, 8\)", tokens, queries[:, 0]),
        ("queries must be of as many clips as tokens, 1, got 2", tokens[:1], queries),
        ("tokens must be real floating point .* got torch.int64", tokens.long(), queries),
    ):

        def film(first=first):
            yield first
            pytest.fail("a second chunk is asked for")

        with pytest.raises((TypeError, ValueError), match=words):
            compressor.forward_chunked(film(), wrong)

    def damaged():
        yield tokens
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        compressor.forward_chunked(damaged(), queries)
    due = compressor(tokens, queries)
    for sizes in ([0, 3, 0, 4], [7, 0]):
        torch.testing.assert_close(compressor.forward_chunked(iter(tokens.split(sizes, 1)), queries), due)


def test_a_chunk_frees_its_sequence_before_the_scan(monkeypatch):
    """It is as long as what the scan makes of it."""
    compressor, tokens, queries = compressor_and_inputs()
    sequences, alive = [], []
    insert_, scan = chunks.norm_and_insert, chunks.one_direction_eager

    def inserted(*given):
        made = insert_(*given)
        sequences.append(weakref.ref(made[0]))
        return made

    def scanned(*given, **options):
        alive.append([made() is not None for made in sequences])
        return scan(*given, **options)

    monkeypatch.setattr(chunks, "norm_and_insert", inserted)
    monkeypatch.setattr(chunks, "one_direction_eager", scanned)
    with torch.no_grad():
        compressor.forward_chunked(tokens, queries, chunk_frames=3)
    assert len(alive) == 6 and not any(map(any, alive))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("chunked", [False, True])
def test_parameters_of_another_dtype_or_device_are_said(chunked):
    compressor, tokens, queries = compressor_and_inputs()

    def run(module, *given):
        return module.forward_chunked(*given, chunk_frames=2) if chunked else module(*given)

    with pytest.raises(ValueError, match="queries are torch.float64, parameters torch.float32; allowed: one dtype, or"):
        run(compressor, tokens.double(), queries.double())
    with pytest.raises(ValueError, match="queries are on meta; allowed: cpu, where the parameters are"):
        run(compressor, tokens.to("meta"), queries.to("meta"))
    low = tokens.bfloat16(), queries.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert run(compressor, *low).dtype == torch.bfloat16
    precise = BimbaCompressor(8, d_state=4, fp32=True).bfloat16()
    with pytest.raises(ValueError, match="torch.bfloat16, which fp32 computes in torch.float32, parameters torch.bfloat16"):
        run(precise, *low)


def test_wrapped_modules_are_called():
    """An adapter around in_proj changes the result as it does in the reference."""
    compressor, tokens, queries = compressor_and_inputs()
    other = reference.BimbaCompressor(8, d_state=4)
    other.load_state_dict(compressor.state_dict())

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for module in (compressor, other):
        plain = module.layers[0].mixer.in_proj
        module.layers[0].mixer.in_proj = Doubled(8, 32, bias=False)
        module.layers[0].mixer.in_proj.weight = plain.weight
    torch.testing.assert_close(compressor(tokens, queries), other(tokens, queries), rtol=1e-5, atol=1e-5)


def test_autocast():
    compressor, tokens, queries = compressor_and_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        low = compressor(tokens, queries)
    due = compressor(tokens, queries)
    assert low.dtype == torch.float32 and (low - due).norm() < 0.02 * due.norm()
