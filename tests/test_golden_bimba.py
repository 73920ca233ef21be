"""Numbers that upstream's BIMBA gave, forward and backward, reproduced by both packages."""


import pytest
import torch
from golden import assert_golden, assert_sums, fill, golden

GRADIENTS = {
    "norm.weight": "1972.60864 2034.76488", "mixer.A_log": "-2.91261 24.88669", "mixer.D": "-8.16173 70.52511",
    "mixer.A_b_log": "3.45539 26.17684", "mixer.D_b": "-88.74403 120.06919", "mixer.in_proj.weight": "1172.76745 39163.51243",
    "mixer.conv1d.weight": "50.64191 866.34037", "mixer.conv1d.bias": "-3.28524 281.21670",
    "mixer.x_proj.weight": "1011.31729 8349.07136", "mixer.dt_proj.weight": "4.72363 17.87939",
    "mixer.dt_proj.bias": "3.61553 27.81686", "mixer.conv1d_b.weight": "-815.64879 5526.66079",
    "mixer.conv1d_b.bias": "1003.73387 1527.56970", "mixer.x_proj_b.weight": "-1005.70926 41470.87496",
    "mixer.dt_proj_b.weight": "-143.63198 600.99785", "mixer.dt_proj_b.bias": "273.11092 289.65391",
    "mixer.out_proj.weight": "-972.58649 4875.48032",
}  # fmt: skip
INPUT_GRADIENTS = {"tokens": "567.42995 4832.00560", "queries": "-340.27137 1676.41204"}


def inputs(frames, grid, query_frames, queries_of_frame):
    return fill(1, frames, *grid, 24, phase=7), fill(1, query_frames, queries_of_frame, 24, phase=5)


def compressed(package, *sizes, **options):
    return golden(package.BimbaCompressor(24, **options))(*inputs(*sizes))


B1 = (2, (6, 6), 1, 9)
B4 = (4, (3, 4), 2, 6)


def test_b1_forward_and_gradients(package):
    module, (tokens, queries) = golden(package.BimbaCompressor(24)), inputs(*B1)
    assert package.interleave(72, 9).tolist() == list(range(8, 81, 9))
    out = module(tokens.requires_grad_(), queries.requires_grad_())
    assert_golden(out, "4.001227 -0.837700 -0.023556 3.964583 1.290852 -3.686544")
    assert_golden(out.flatten()[-3:], "-1.083830 0.793898 0.215379")
    assert_sums(out, "11.65770", "163.25784")
    out.square().sum().backward()
    found = {name.removeprefix("layers.0."): p for name, p in module.named_parameters()}
    assert found.keys() == GRADIENTS.keys()
    for name, sums in (GRADIENTS | INPUT_GRADIENTS).items():
        assert_sums((found | {"tokens": tokens, "queries": queries})[name].grad, *sums.split())


def test_b2_broken_ratio(package):
    assert package.interleave(105, 36)[:12].tolist() == [3, 7, 11, 15, 19, 23, 27, 31, 35, 38, 42, 46]
    out = compressed(package, 3, (5, 7), 3, 12)
    assert_golden(out, "0.403189 -0.158924 0.132245 0.137455 -0.813531 -0.318143")
    assert_sums(out, "4.24176", "669.73000")


def test_b3_a_ratio_at_which_the_floor_is_another(package):
    assert package.interleave(29, 22)[:12].tolist() == [2, 4, 6, 9, 11, 13, 15, 18, 20, 22, 24, 27]
    out = compressed(package, 1, (1, 29), 1, 22)
    assert_golden(out, "2.031293 -0.157736 0.392577 0.600141 1.091974 -2.327559")
    assert_sums(out, "16.11191", "375.52839")


@pytest.mark.parametrize(
    ("sizes", "options", "first", "sums"),
    [
        (B4, {"n_layer": 2}, "2.377765 0.186715 -0.702513 0.104796 -0.250035 -1.942371", "-31.39567 380.47232"),
        (B4, {"n_layer": 2, "multi_scale": False}, "1.487597 -0.720742 -0.103281 0.627898 0.596021 -1.296890", "-7.22080"),
        (B1, {"mixer_type": "attention"}, "0.674390 -0.449969 -0.349662 1.575005 0.104731 -1.325345", "9.09550 113.74422"),
        (B1, {"bimamba": False}, "0.136496 -0.545680 0.581646 0.590603 -0.440277 -0.497453", "-9.80336"),
    ],
    ids=["B4", "B5", "B6", "B7"],
)
def test_b4_to_b7_options(package, sizes, options, first, sums):
    out = compressed(package, *sizes, **options)
    assert_golden(out, first)
    assert_sums(out, *sums.split())


@pytest.mark.parametrize(
    ("frames", "options", "shape", "first", "sums"),
    [
        (4, {}, (4, 16), "2.654931 -3.892150 -2.675124 0.306973 4.722794 5.182075", "-49.10799 950.30477"),
        (5, {"temporal_pooling": 2}, (2, 16), "0.218497 -0.352514 0.308454 0.502841 0.301495 -0.535012", "-23.55965"),
        (4, {"pool": "average"}, (4, 9), "0.441106 -0.525277 -0.788419 0.142330 -0.696438 0.462100", "-4.76326"),
    ],
    ids=["bilinear", "temporal", "average"],
)
def test_b8_released_path(package, frames, options, shape, first, sums):
    features = fill(frames, 7, 7, 24, phase=7)
    queries = package.bimba_queries(features, **options)
    assert queries.shape == (*shape, 24)
    out = golden(package.BimbaCompressor(24))(features[None], queries[None])
    assert_golden(out, first)
    assert_sums(out, *sums.split())


def test_b9_recipe_of_the_paper(package):
    tokens = fill(1, 8, 6, 6, 24, phase=7)
    queries = package.bimba_queries(tokens, pool="average", frame_stride=4)
    assert queries.shape == (1, 2, 9, 24)
    out = golden(package.BimbaCompressor(24))(tokens, queries)
    assert_golden(out, "0.395667 -0.219231 0.146173 0.630348 -0.500691 -0.275917")
    assert_sums(out, "10.88210", "260.03043")


def test_places_are_those_of_an_integer_linspace(package):
    sizes = [(36864, 2304), (102400, 6400), (46656, 12544), (93312, 25088), (1, 1), (1, 9), (29, 22), (7, 40)]
    for num_tokens, num_queries in sizes + [(t, q) for t in range(1, 40, 3) for q in range(1, 40)]:
        due = torch.linspace(0, num_tokens + num_queries - 1, num_queries + 1, dtype=torch.int64)[1:]
        assert torch.equal(package.interleave(num_tokens, num_queries), due)
