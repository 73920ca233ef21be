"""Numbers that upstream's code gave, reproduced by both packages from a state_dict in upstream's layout."""

from types import ModuleType

import pytest
import torch
from golden import assert_golden, assert_sums, fill, golden

TOY = {"img_size": 32, "depth": 3, "embed_dim": 32, "num_frames": 4, "num_classes": 5}
CLIP = fill(2, 3, 4, 32, 32, phase=7)
IMAGE = fill(2, 3, 32, 32, phase=7)
MASK = torch.zeros(2, 17, dtype=torch.bool)
MASK[:, 2::2] = True


def classifier(package: ModuleType, **overrides):
    return golden(package.VideoMamba(package.VideoMambaConfig(**TOY | overrides)))


def encoder(package: ModuleType, **overrides):
    return golden(package.VideoMambaEncoder(package.VideoMambaConfig(**TOY | {"clip_output_dim": 12} | overrides)))


def test_fill():
    assert_golden(fill(4, phase=0), "0.84338078 -0.885563661 0.116445177 -0.252532571")
    assert_golden(fill(4, phase=7), "0.877884546 -0.129487977 -0.852393448 0.613137066")


def test_g1_scan(package):
    u, delta, z = (fill(2, 3, 7, phase=p).transpose(1, 2) for p in (1, 2, 6))
    B, C = (fill(2, 4, 7, phase=p).transpose(1, 2) for p in (3, 4))
    A = -torch.arange(1.0, 5.0).repeat(3, 1)
    y, last = package.selective_scan(u, delta, A, B, C, fill(3, phase=5), z, fill(3, phase=8))
    assert_golden(y[0, :, 0], "-0.170812 0.250988 0.018387 -0.049467 0.035219 0.011530 -0.182886")
    assert_sums(y, "0.380458", "3.873859")
    assert_golden(last[0, 0], "0.256958 -0.109856 -0.020354 -0.241193")
    assert_sums(last, "-0.128229")


def test_g2_mixer(package):
    x = fill(2, 9, 32, phase=7)
    y = golden(package.Mamba(32))(x)
    assert_golden(y, "0.001786 -0.017569 -0.030638 0.169604 0.136295 -0.103578")
    assert_sums(y, "-2.29319", "60.32175")
    assert_golden(y[1, 8], "0.159327 0.032359 0.017528 0.115599")
    y = golden(package.Mamba(32, bimamba=False))(x)
    assert_golden(y, "-0.007378 0.036992 0.048677 0.004266 0.081128 -0.122279")
    assert_sums(y, "0.13765", "42.45064")


@pytest.mark.parametrize(
    ("overrides", "logits"),
    [
        ({}, "-0.039053 1.074670 -1.510916 0.146224 -1.223465 -0.498566 0.639726 -0.698103 2.107564 0.725816"),
        ({"fused_add_norm": False},
         "-0.039053 1.074670 -1.510916 0.146224 -1.223465 -0.498566 0.639726 -0.698103 2.107564 0.725816"),
        ({"kernel_size": 2}, "-0.092844 1.082945 0.385388 1.567895 1.068252 -0.119805 0.564155 0.637959 1.054671 -0.410606"),
        ({"rms_norm": False}, "0.301473 0.961575 -1.861450 0.036989 -1.196558 -0.366484 0.758165 0.482871 2.294821 1.445516"),
    ],
    ids=["plain", "unfused-norm", "tubelet-2", "layernorm"],
)  # fmt: skip
def test_g3_video_logits(package, overrides, logits):
    assert_golden(classifier(package, **overrides)(CLIP), logits)


def test_g3_cls_feature(package):
    feature = classifier(package, num_classes=0)(CLIP)
    assert_golden(feature, "0.613462 0.682591 0.243154 -0.157716 -0.293939 0.812174")
    assert_sums(feature, "3.51016", "52.29255")


def test_fused_and_unfused_norm_agree_bitwise(package):
    """They are the same bits in the reference, as in upstream's code, and agree to the golden tolerance in fused."""
    difference = classifier(package)(CLIP) - classifier(package, fused_add_norm=False)(CLIP)
    assert difference.abs().max() <= (0 if package.__name__ == "reference" else 1e-5)


def test_g4_image_logits(package):
    logits = classifier(package, num_frames=None)(IMAGE)
    assert_golden(logits, "1.237250 0.363767 -0.618117 2.406715 -0.554918 -0.689778 -0.648748 1.777957 2.003895 0.113546")


def test_g5_distillation_student(package):
    features = classifier(package, num_frames=None, distill_dim=12)(IMAGE).features
    assert features.shape == (2, 5, 12)
    assert_golden(features, "-0.511398 -0.085741 0.014891 0.347640 0.100766 0.390984")
    assert_sums(features, "1.11655", "28.22387")


def test_g6_masked_pretraining(package):
    model = encoder(package, add_pool_norm=False)
    out = model(CLIP, MASK)
    assert out.clip.shape == (1, 2, 9, 12) and out.pooled is None and out.tokens.shape == (2, 9, 32)
    assert_golden(out.clip, "0.111764 -0.536491 0.331569 -0.210102 -0.245502 -0.220785")
    assert_sums(out.clip, "0.93434", "51.09635")

    out.clip.square().mul(torch.linspace(0, 1, out.clip.numel()).view_as(out.clip)).sum().backward()
    untouched = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    last_layer = {name for name, _ in model.named_parameters() if name.startswith("layers.2.")}
    assert last_layer | {"norm.weight"} == untouched

    out = encoder(package, add_pool_norm=False, clip_return_layer=2)(CLIP, MASK)
    assert_golden(out.clip[0], "0.152407 -0.529731 0.313361 -0.210810 -0.249663 -0.221747")
    assert_sums(out.clip[0], "0.90893")
    assert_golden(out.clip[1], "-0.395803 -0.137453 0.059747 0.310588 -0.217427 0.089998")
    assert_sums(out.clip[1], "2.51425")


def test_last_feature_differs_without_fused_norm(package):
    """With fused_add_norm upstream's aligned feature leaves out the last mixer, otherwise it does not."""
    fused, unfused = (encoder(package, add_pool_norm=False, fused_add_norm=f)(CLIP, MASK).clip for f in (True, False))
    assert (fused - unfused).abs().max() > 0.1


def test_g7_multimodal_encoder(package):
    model = encoder(package, clip_norm_type="none")
    out = model(CLIP, MASK)
    assert out.tokens.shape == (2, 8, 32)
    assert_sums(out.tokens, "22.13089", "418.42501")
    assert_golden(out.tokens, "-0.248228 0.612735 0.414772")
    assert out.pooled.shape == (2, 1, 32)
    assert_golden(out.pooled, "0.962477 -2.651568 -0.254908 -1.945971 0.482703 1.485730")
    assert_sums(out.pooled, "0.13745")
    assert_golden(out.clip, "0.393064 -1.886787 1.166097 -0.738907 -0.863404 -0.776479")
    assert_sums(out.clip, "3.26459")

    pooled = model(CLIP, keep_temporal=True).pooled
    assert pooled.shape == (2, 4, 32)
    assert_golden(pooled, "-0.239648 1.665615 0.839938 0.133761 0.016395 0.895405")
    assert_sums(pooled, "-3.30679")

    pooled = model(CLIP[:, :, :1], use_image=True).pooled
    assert_golden(pooled, "-0.385762 1.487672 0.629688 0.686035 -1.871108 0.171525")
    assert_sums(pooled, "-0.19310")


G8 = """
cls_token -33.442549 78.054587; pos_embed -47.905760 207.032252; temporal_pos_embedding -14.463211 101.928973;
layers.0.mixer.A_log 0.088721 1.061273; layers.0.mixer.A_b_log -1.291907 7.098599;
layers.0.mixer.D -0.729981 7.586088; layers.0.mixer.D_b -1.944577 17.064837;
layers.0.mixer.in_proj.weight 36.566076 2350.843354; layers.0.mixer.conv1d.weight 4.847409 45.048274;
layers.0.mixer.conv1d_b.weight 16.107946 184.885963; layers.0.mixer.x_proj.weight 23.458684 221.429707;
layers.0.mixer.x_proj_b.weight 100.990151 1890.755618; layers.0.mixer.dt_proj.bias 0.402006 2.536149;
layers.0.mixer.dt_proj_b.bias 2.445309 15.150919; layers.2.mixer.A_log 0 0;
layers.2.mixer.out_proj.weight -15.162823 488.824285; layers.2.norm.weight -9.012443 22.586421;
norm_f.weight 22.008042 27.857813; head.weight -8.270286 363.491549
"""


@pytest.mark.parametrize(
    ("package", "dtype"), [("reference", torch.float32), ("reference", torch.float64), ("fused", torch.float64)],
    indirect=["package"],
)  # fmt: skip
def test_g8_gradients(package, dtype):
    """Upstream's float32 numbers hold its convolution's rounding, which the reference shares; `fused` embeds by a matmul,
    1.02e-5 off in float32 and 7e-6, as the reference, in float64."""
    model = classifier(package).to(dtype)
    model(CLIP.to(dtype)).square().sum().backward()
    gradients = dict(model.named_parameters())
    for entry in G8.split(";"):
        name, total, absolute = entry.split()
        assert_sums(gradients[name].grad, total, absolute)
    assert not gradients["layers.2.mixer.A_log"].grad.any()


COUNTS = [
    ("tiny", {"num_frames": None}, 7_148_008), ("small", {"num_frames": None}, 25_796_584),
    ("middle", {"num_frames": None}, 74_217_448), ("base", {"num_frames": None}, 97_598_440),
    ("tiny", {"num_classes": 400}, 7_033_744), ("small", {"num_classes": 400}, 25_568_656),
    ("middle", {"num_classes": 400}, 73_875_856), ("tiny", {"num_classes": 400, "num_frames": 64}, 7_044_496),
    ("small", {"num_classes": 400, "num_frames": 64}, 25_590_160),
    ("middle", {"num_classes": 400, "num_frames": 64}, 73_908_112),
    ("middle", {"num_frames": None, "distill_dim": 384}, 74_439_592),
]  # fmt: skip


@pytest.mark.parametrize(("size", "overrides", "count"), COUNTS)
def test_parameter_counts(package, size, overrides, count):
    with torch.device("meta"):
        model = package.VideoMamba(getattr(package.VideoMambaConfig, size)(**overrides))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("add_pool_norm", "count"), [(True, 73_942_656), (False, 73_941_504)])
def test_encoder_parameter_counts(package, add_pool_norm, count):
    with torch.device("meta"):
        model = package.VideoMambaEncoder(package.VideoMambaConfig.middle(add_pool_norm=add_pool_norm))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("size", "keys"), [("tiny", 415), ("middle", 551)])
def test_state_dict_sizes(package, size, keys):
    with torch.device("meta"):
        model = package.VideoMamba(getattr(package.VideoMambaConfig, size)(num_frames=None))
    assert len(model.state_dict()) == keys
