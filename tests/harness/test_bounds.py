"""The least times of subjects against calculations by hand."""

import math
from dataclasses import replace

import pytest

from harness.judge.registry import subjects
from harness.records.ceilings import Ceilings
from harness.records.speed import Point

FREE, RATES = Ceilings(math.inf, math.inf, math.inf), Ceilings(copy=1e9, matmul=1e12, exp=1e9, issue=1e10)


def at(mode: str = "infer", dtype: str = "bfloat16", **sizes: int) -> Point:
    return Point("", tuple(sizes.items()), mode, dtype=dtype)


MIXER = 32 * 128 + 64 * 32 + 2 * (64 * 34 + 2 * 64)  # multiply-adds a token of width 32


# 100 tokens of 2 heads of 4 channels, 8 states: x and y have 8 elements, dt 2, B and C 8 each; a head has 2 x 32 multiply-adds
# and 2 exponentials. The backward reads x, dt, B, C and dy, writes 4 gradients, and has three times the products.
SSD = {"B": 2, "L": 50, "H": 2, "P": 4, "N": 8}
# 100 tokens of width 16, 4 heads of 8 channels, 8 states: in_proj has 64 + 16 + 4 rows, out_proj 32 columns. The convolution
# reads and writes 48 channels, the norm reads 32 and 32 and writes 32. The scan has 32, 32, 4, 8 and 8 elements.
MAMBA2 = {"B": 2, "L": 50, "D": 16, "P": 8, "N": 8}
# 60 tokens, 12 of them queries, of width 16; the mixer is 32 wide, with one row of dt and 16 states. Every token has half of
# in_proj and both directions of x_proj and dt_proj, a query the other half and out_proj. The convolution moves 3 x 32 elements.
BIMBA = {"B": 2, "L": 30, "G": 2, "Q": 3, "D": 16}
# 3 layers of width 8, an MLP of 16, 8 channels of keys and values; 2 sequences of 25 tokens, of whose pairs half count.
QWEN2 = {"B": 2, "L": 10, "V": 15, "D": 8, "K": 3}
QWEN2_WEIGHTS = 3 * (3 * 8 * 16 + 2 * 8 * 8 + 8 * 8)
# 3 layers of width 16, an MLP of 32, 16 channels of keys and values, 64 words. The mixers of 2 layers are 32 wide, of 2 heads
# and 16 states. 2 texts of 5 words, 2 videos of 10 tokens.
VAMBA = {"B": 2, "L": 5, "V": 10, "D": 16, "K": 3}
TEXT = 3 * (3 * 16 * 32 + 2 * (2 * 16 * 16 + 16 * 16)) + 16 * 64
MIXERS = 2 * 16 * (3 * 32 + 2 * 16 + 2)
CROSS = 3 * 4 * 10 * 10 * 16  # 10 words, each to the 10 tokens of its video
# 9 layers of 3 texts of 5 words, width 768. 3 layers more have keys and values of 2 videos of 6 tokens of width 10, and
# 6 pairs, with queries and an output of the cross-attention.
WORDS = 12 * 768**2
PAIR = 5 * (WORDS + 2 * 768**2) + 2 * 5 * (5 + 6) * 768
RETRIEVAL = {"B": 2, "M": 3, "K": 4, "L": 5, "V": 6, "C": 768, "D": 10}


@pytest.mark.parametrize(
    ("subject", "point", "only", "seconds"),
    [
        # of a norm x and y in 2 bytes, the residual twice in 4; in training dy, dx and three of the residual
        ("norm", at(B=2, L=50, D=10), "copy", 1000 * 12e-9),
        ("norm", at("train", B=2, L=50, D=10), "copy", 1000 * 28e-9),
        ("norm", at(dtype="float32", B=2, L=50, D=10), "copy", 1000 * 16e-9),
        # of a convolution x and y; in training x again, dy and dx
        ("conv", at(B=2, L=50, E=10, K=4), "copy", 1000 * 4e-9),
        ("conv", at("train", B=2, L=50, E=10, K=4), "copy", 1000 * 10e-9),
        # of a scan u, delta, z and y, and B and C for all channels of a token
        ("scan", at(B=2, L=50, E=10, N=16), "copy", 1000 * (8 + 2 * 16 * 2 / 10) * 1e-9),
        ("scan", at(B=2, L=50, E=10, N=16), "exp", 1000 * 20e-9),
        ("scan", at(B=2, L=50, E=10, N=16), "issue", 1000 * 110e-10),
        ("scan", at("train", B=2, L=50, E=10, N=16), "exp", 1000 * (20 + 21) * 1e-9),
        ("scan", at("train", B=2, L=50, E=10, N=16), "issue", 1000 * (110 + 259) * 1e-10),
        ("scan_both", at(B=2, L=50, E=10, N=16), "exp", 2 * 1000 * 20e-9),
        # of a mixer in_proj D x 2E, out_proj E x D, and in each direction x_proj E x (R + 2N) and dt_proj R x E
        ("mixer", at(B=2, L=50, D=32), "matmul", 2 * 100 * MIXER / 1e12),
        ("mixer", at("train", B=2, L=50, D=32), "matmul", 3 * 2 * 100 * MIXER / 1e12),
        ("mixer", at(B=2, L=50, D=32), "exp", 2 * 100 * 64 * 20e-9),
        ("ssd", at(**SSD), "copy", 100 * (8 + 8 + 2 + 8 + 8) * 2e-9),
        ("ssd", at("train", **SSD), "copy", 100 * (34 + 8 + 2 + 8 + 8 + 8 + 8 + 2 + 8 + 8) * 2e-9),
        ("ssd", at(**SSD), "matmul", 100 * 256e-12),
        ("ssd", at("train", **SSD), "matmul", 100 * 4 * 256e-12),
        ("ssd", at(**SSD), "exp", 100 * 4e-9),
        ("ssd", at("train", **SSD), "exp", 100 * 8e-9),
        ("mamba2", at(**MAMBA2), "matmul", 100 * (2 * 16 * (84 + 32) + 4 * 4 * 8 * 8) * 1e-12),
        ("mamba2", at("train", **MAMBA2), "matmul", 100 * (3 * 2 * 16 * (84 + 32) + 4 * 4 * 4 * 8 * 8) * 1e-12),
        ("mamba2", at(**MAMBA2), "copy", 100 * (2 * 48 + 3 * 32 + 84) * 2e-9),
        ("mamba2", at("train", **MAMBA2), "copy", 100 * (2.5 * (2 * 48 + 3 * 32) + 84 + 136) * 2e-9),
        ("bimba", at(**BIMBA), "matmul", 2 * (60 * (512 + 2 * (32 * 33 + 32)) + 12 * 1024) * 1e-12),
        ("bimba", at("train", **BIMBA), "matmul", 6 * (60 * (512 + 2 * (32 * 33 + 32)) + 12 * 1024) * 1e-12),
        ("bimba", at(**BIMBA), "exp", 2 * 60 * 32 * (16 + 4 / 5) * 1e-9),
        ("bimba", at("train", **BIMBA), "exp", 2 * 60 * 32 * (16 + 4 / 5 + 16 + 5 / 5) * 1e-9),
        ("bimba", at(**BIMBA), "copy", (60 * 3 * 32 * 2 + 2 * 60 * 32 * (2 * 2 + 2 * 2 / 5 + 16 * 2 / 32)) * 1e-9),
        ("bimba", at(**BIMBA), "issue", 2 * 60 * 32 * (3 * 16 + 20 + 42 / 5) * 1e-10),
        ("qwen2", at(**QWEN2), "matmul", (2 * 50 * QWEN2_WEIGHTS + 3 * 2 * 2 * 25 * 25 * 8) * 1e-12),
        ("qwen2", at("train", **QWEN2), "matmul", 3 * (2 * 50 * QWEN2_WEIGHTS + 3 * 2 * 2 * 25 * 25 * 8) * 1e-12),
        ("qwen2", at(**QWEN2), "copy", QWEN2_WEIGHTS * 2e-9),
        ("vamba", at(**VAMBA), "matmul", (2 * 20 * (MIXERS + 3 * 16 * 16) + 2 * 10 * TEXT + CROSS + 2 * 20 * 2048) * 1e-12),
        ("vamba", at(**VAMBA), "copy", (TEXT + MIXERS + 2 * 3 * 16 * 20 + 2 * 20 * (7 * 32 + 32 + 32 + 2 + 32)) * 2e-9),
        ("vamba", at(**VAMBA | {"L": 1}), "copy", (TEXT + 3 * 16 * 20) * 2e-9),
        ("vamba", at(**VAMBA | {"L": 1}), "matmul", (2 * 2 * TEXT + CROSS / 5) * 1e-12),
        ("retrieval", at(**RETRIEVAL), "matmul", 2 * (9 * 15 * WORDS + 3 * (2 * 6 * 2 * 768 * 10 + 6 * PAIR)) * 1e-12),
        ("retrieval", at(**RETRIEVAL), "copy", 2 * 6 * 10 * 2e-9),
        ("resamplers", at(B=2, F=3, H=4, W=5, G=2, Q=6, D=10), "copy", (120 + 24) * 10 * 2e-9),
        ("resamplers", at("train", B=2, F=3, H=4, W=5, G=2, Q=6, D=10), "copy", 2 * (120 + 24) * 10 * 2e-9),
        ("clips", at(T=4), "copy", 4 * 256 * 340 * 3e-9),
    ],
)  # fmt: skip
def test_bounds_by_hand(subject: str, point: Point, only: str, seconds: float) -> None:
    one = replace(FREE, **{only: getattr(RATES, only)})
    assert subjects()[subject].bound(point, "", one) == pytest.approx(seconds, rel=1e-12)


def test_what_overlaps_costs_the_longest_of_its_parts() -> None:
    scan, point = subjects()["scan"], at(B=2, L=50, E=10, N=16)
    parts = [scan.bound(point, "", replace(FREE, **{name: getattr(RATES, name)})) for name in ("copy", "exp", "issue")]
    assert scan.bound(point, "", RATES) == max(parts) < sum(parts)


def test_bounds_of_models_by_hand() -> None:
    """The tiny ViT has 12 layers of width 192: 12 D^2 of matrices a token, and 2 L D of attention."""
    matmul = replace(FREE, matmul=1e12)
    vit, tokens, L = subjects()["vit"], 34, 17
    linear, mixing = 2 * tokens * 12 * 192**2, 2 * tokens * 2 * L * 192
    for mode, due in (("infer", linear + mixing), ("train", 3 * linear + 3.5 * mixing)):
        clip = Point("tiny", (("B", 2), ("T", 1), ("S", 64), ("L", L)), mode)
        assert vit.bound(clip, "tiny", matmul) == pytest.approx(12 * due / 1e12)
    mixer, norm, video = (subjects()[name] for name in ("mixer", "norm", "videomamba"))
    clip = replace(at(B=2, T=1, S=64, L=17), race="tiny")
    layer = mixer.bound(at(B=2, L=17, D=192), "", RATES) + norm.bound(at(B=2, L=17, D=192), "", RATES)
    assert video.bound(clip, "tiny", RATES) == pytest.approx(24 * layer)
    stream, exp = replace(clip, race="stream"), replace(FREE, exp=1e9)
    assert video.bound(stream, "tiny", exp) == pytest.approx(video.bound(clip, "tiny", exp) / 2)
