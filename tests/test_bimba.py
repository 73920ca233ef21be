"""BIMBA's compressor and queries beside their golden numbers: initial values, keys, options and bad input, of both packages."""


import pytest
import torch
from torch import nn

import fused
import reference


def inputs(frames=2, queries=4, width=8, clips=1):
    return torch.randn(clips, frames, 2, 3, width), torch.randn(clips, 1, queries, width)


def test_keys_and_sizes_are_upstreams(package):
    with torch.device("meta"):
        compressor = package.BimbaCompressor(3584)
        attention = package.BimbaCompressor(64, mixer_type="attention")
    assert sum(p.numel() for p in compressor.parameters()) == 84_284_928
    shapes = {name.removeprefix("layers.0."): tuple(x.shape) for name, x in compressor.state_dict().items()}
    assert len(shapes) == 17 and shapes["norm.weight"] == (3584,) and shapes["mixer.in_proj.weight"] == (14336, 3584)
    assert shapes["mixer.x_proj_b.weight"] == (256, 7168) and shapes["mixer.A_b_log"] == (7168, 16)
    names = {name.removeprefix("layers.0.mixer.") for name in attention.state_dict()} - {"layers.0.norm.weight"}
    biased = [f"{name}.{part}" for name in ("in_proj", "proj", "out_proj") for part in ("weight", "bias")]
    assert names == {"qkv.weight", *biased}


def test_initial_values(package):
    torch.manual_seed(0)
    upstream, corrected = (package.BimbaCompressor(64, initial_values=v).layers[0].mixer for v in ("upstream", "corrected"))
    log = torch.arange(1.0, 17).log().expand(128, 16)
    assert torch.equal(upstream.A_log, log) and torch.equal(corrected.A_b_log, log)
    other = upstream.A_b_log != log
    assert not upstream.A_b_log.diagonal().any() and other.sum() == 15 and other.diagonal()[1:].all()
    step = {m: nn.functional.softplus(m.dt_proj_b.bias) for m in (upstream, corrected)}
    assert step[upstream].min() > 0.4 and 1e-4 <= step[corrected].min() and step[corrected].max() <= 0.11
    assert nn.functional.softplus(upstream.dt_proj.bias).max() <= 0.11


@pytest.mark.parametrize("mixer_type", ["mamba", "attention"])
def test_training_starts_at_the_queries(package, mixer_type):
    compressor = package.BimbaCompressor(8, n_layer=2, mixer_type=mixer_type)
    tokens, queries = inputs()
    assert not torch.equal(compressor(tokens, queries), queries)
    compressor.zero_out_proj()
    if mixer_type == "attention":
        nn.init.zeros_(compressor.layers[-1].mixer.out_proj.bias)  # which upstream leaves
    compressor.layers = compressor.layers[1:]
    assert torch.equal(compressor(tokens, queries), queries)


@pytest.mark.parametrize(
    "options", [{}, {"use_norm": False}, {"use_res": False}, {"n_layer": 2}, {"mixer_type": "attention"}], ids=str
)
def test_clips_are_independent_of_each_other(package, options):
    compressor, (tokens, queries) = package.BimbaCompressor(8, **options), inputs(clips=3)
    whole = compressor(tokens, queries)
    for i in range(3):
        torch.testing.assert_close(compressor(tokens[i : i + 1], queries[i : i + 1])[0], whole[i], rtol=1e-4, atol=1e-5)


def test_fp32_computes_in_float32(package):
    torch.manual_seed(0)
    compressor, (tokens, queries) = package.BimbaCompressor(8, fp32=True), inputs()
    low = compressor(tokens.bfloat16(), queries.bfloat16())
    due = compressor(tokens.bfloat16().float(), queries.bfloat16().float())
    assert low.dtype == torch.bfloat16 and torch.equal(low, due.bfloat16())


def test_further_layers_read_every_second_frame(package):
    """Frames of odd numbers reach the result through the first layer only, whose mixer of no forward step is silenced here."""
    torch.manual_seed(0)
    compressor, (tokens, queries) = package.BimbaCompressor(8, n_layer=2), inputs(frames=5)
    nn.init.zeros_(compressor.layers[0].mixer.out_proj.weight)
    changed = tokens.clone()
    changed[:, 1::2] += 1
    assert torch.equal(compressor(changed, queries), compressor(tokens, queries))
    compressor.multi_scale = False
    assert not torch.equal(compressor(changed, queries), compressor(tokens, queries))


def test_pooled_queries(package):
    features = torch.arange(4 * 5 * 3 * 2, dtype=torch.float32).view(4, 5, 3, 2)
    assert package.bimba_queries(features).shape == (4, 6, 2)
    assert package.bimba_queries(features, "max").shape == (4, 2, 2)
    every_other = package.bimba_queries(features, "average", temporal_pooling=2, stride=1, frame_stride=2)
    torch.testing.assert_close(every_other[0], features[::2].mean(0).flatten(0, 1))
    two = torch.stack((features, -features))
    torch.testing.assert_close(package.bimba_queries(two)[1], package.bimba_queries(-features))
    pooled = package.bimba_queries(features, "average")
    torch.testing.assert_close(pooled[1, 0], features[1, :2, :2].mean((0, 1)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_layer": 0}, "n_layer .*0"),
        ({"d_model": 0}, "d_model .*0"),
        ({"d_state": 0}, "d_state .*0"),
        ({"d_conv": -1}, "d_conv .*-1"),
        ({"expand": 0}, "expand .*0"),
        ({"mixer_type": "conv"}, "mixer_type .*'conv'"),
        ({"query_pos": "right"}, "query_pos .*'right'"),
        ({"initial_values": "zeros"}, "initial_values .*'zeros'"),
        ({"mixer_type": "attention", "d_model": 3}, "expand \\* d_model is 6"),
    ],
    ids=str,
)
def test_options_that_do_not_exist_raise(package, options, words):
    with pytest.raises(ValueError, match=words):
        package.BimbaCompressor(**{"d_model": 8, **options})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("tokens", "queries", "words"),
    [
        ((1, 2, 3, 8), (1, 1, 4, 8), r"tokens .*\(1, 2, 3, 8\)"),
        ((1, 2, 2, 3, 8), (1, 4, 8), r"queries .*\(1, 4, 8\)"),
        ((1, 2, 2, 3, 6), (1, 1, 4, 8), "tokens .*6"),
        ((1, 2, 2, 3, 8), (1, 1, 4, 6), "queries .*6"),
        ((1, 0, 2, 3, 8), (1, 1, 4, 8), "tokens .*at least one"),
        ((1, 2, 2, 3, 8), (1, 1, 0, 8), "queries .*at least one"),
        ((2, 2, 2, 3, 8), (1, 1, 4, 8), "queries .*clips"),
    ],
    ids=str,
)
def test_inputs_that_do_not_fit_raise(package, tokens, queries, words):
    with pytest.raises(ValueError, match=words):
        package.BimbaCompressor(8)(torch.randn(tokens), torch.randn(queries))
    tokens, queries = inputs()
    with pytest.raises(ValueError, match="queries .*bfloat16"):
        package.BimbaCompressor(8)(tokens, queries.bfloat16())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((4, 5, 3), {}, r"\(4, 5, 3\)"),
        ((4, 5, 3, 2), {"pool": "median"}, "pool .*'median'"),
        ((4, 5, 3, 2), {"stride": 0}, "stride .*0"),
        ((4, 5, 3, 2), {"temporal_pooling": 5}, "leave no query"),
        ((4, 5, 3, 2), {"pool": "average", "stride": 4}, "leave no query"),
        ((4, 5, 3, 2), {"frame_stride": True}, "frame_stride .*True"),
    ],
    ids=str,
)
def test_queries_that_cannot_be_made_raise(package, shape, options, words):
    with pytest.raises(ValueError, match=words):
        package.bimba_queries(torch.randn(shape), **options)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (-1, 2)])
def test_no_token_and_no_query_raise(package, sizes):
    with pytest.raises(ValueError, match="num_(tokens|queries) is (0|-1)"):
        package.interleave(*sizes)


def test_unknown_keys_raise(package):
    compressor = package.BimbaCompressor(8)
    with pytest.raises(RuntimeError, match="query_tokens"):
        compressor.load_state_dict(compressor.state_dict() | {"query_tokens": torch.zeros(1)})


@pytest.mark.parametrize("use_res", [True, False])
@pytest.mark.parametrize("fp32", [True, False])
@pytest.mark.parametrize("n_layer", [1, 2])
def test_autocast_returns_what_the_reference_returns(n_layer, fp32, use_res):
    """Without a residual the queries come out in autocast's dtype, also in chunks of which some have no query."""
    options = {"n_layer": n_layer, "fp32": fp32, "use_res": use_res, "multi_scale": False}
    made = [package.BimbaCompressor(16, **options) for package in (reference, fused)]
    made[1].load_state_dict(made[0].state_dict())
    tokens, queries = torch.randn(1, 4, 2, 2, 16), torch.randn(1, 1, 1, 16)
    with torch.autocast("cpu", torch.bfloat16):
        due, got = (m(tokens, queries) for m in made)
        assert got.dtype == due.dtype == (torch.float32 if use_res or fp32 else torch.bfloat16)
        if n_layer == 1:
            assert made[1].forward_chunked(tokens, queries, chunk_frames=1).dtype == due.dtype
