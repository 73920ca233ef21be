"""Numbers that upstream's Mamba-2 gave, forward and backward, reproduced by both packages."""


import torch
from golden import assert_golden, assert_sums, fill, golden

SEGMENTS = torch.tensor([[0] * 13 + [1] * 5 + [2] * 19] * 2)
M3 = {"ngroups": 2, "d_ssm": 32, "D_has_hdim": True, "norm_before_gate": True, "dt_limit": (0.05, 0.3)}
GRADIENTS = {
    "in_proj.weight": "1599.46851 43302.64219", "conv1d.weight": "256.95271 2897.23399",
    "conv1d.bias": "-159.75392 1377.20471", "dt_bias": "0.73371 14.55620", "A_log": "1.19921 6.79858",
    "D": "8.76294 229.29321", "norm.weight": "4730.33576 4730.33576", "out_proj.weight": "-681.59975 40087.75612",
    "u": "-404.31455 9451.00850",
}  # fmt: skip


def mixer(package, **options):
    return golden(package.Mamba2(32, expand=2, headdim=8, d_state=16, **options))


def tokens():
    return fill(2, 37, 32, phase=7)


def test_m1_forward_and_gradients(package):
    module, u = mixer(package), tokens().requires_grad_()
    y = module(u)
    assert_golden(y, "0.560663 -0.598115 -1.042151 1.149293 1.607808 -1.124142")
    assert_golden(y[1, 36], "-0.389850 -0.650068 0.557456 0.164818")
    assert_sums(y, "6.74606", "1899.44423")
    y.square().sum().backward()
    found = dict(module.named_parameters()) | {"u": u}
    assert found.keys() == GRADIENTS.keys()
    for name, sums in GRADIENTS.items():
        assert_sums(found[name].grad, *sums.split())


def test_m2_segments(package):
    y = mixer(package)(tokens(), seq_idx=SEGMENTS)
    assert_golden(y, "0.560663 -0.598115 -1.042151 1.149293 1.607808 -1.124142")
    assert_golden(y.flatten()[-3:], "-0.113670 -0.389680 -0.605952")
    assert_sums(y, "24.21985", "1891.76745")


def test_m3_groups_mlp_and_other_norm(package):
    y = mixer(package, **M3)(tokens())
    assert_golden(y, "-0.107437 0.016185 -0.294211 0.078284 0.360516 0.283824")
    assert_sums(y, "3.94236", "463.96903")


def scanned(package, **options):
    B, C = (fill(2, 20, 2, 16, phase=p) for p in (3, 4))
    x, z = (fill(2, 20, 4, 8, phase=p) for p in (1, 6))
    A = -torch.arange(1.0, 5.0)
    return package.ssd(
        x, fill(2, 20, 4, phase=2), A, B, C, fill(4, phase=5), z, fill(4, phase=8),
        initial_state=fill(2, 4, 8, 16, phase=9), **options,
    )  # fmt: skip


def test_s1_scan(package):
    y, state = scanned(package)
    assert_golden(y, "-0.107755 -1.067741 0.161061 0.144009 -1.221042 0.144810")
    assert_golden(y.flatten()[-3:], "0.450802 -0.073413 0.803923")
    assert_sums(y, "5.97726", "160.17706")
    assert_golden(state, "-0.029513 -0.382850 -0.383056 0.336491 -0.107786 -0.017440")
    assert_golden(state.flatten()[-3:], "0.203898 -0.339697 -0.446439")
    assert_sums(state, "-20.16438", "215.60860")


def test_s2_scan_of_segments(package):
    y, state = scanned(package, seq_idx=torch.tensor([[0] * 6 + [1] * 14, [0] * 20]))
    assert_sums(y, "5.59868", "160.59504")
    assert_golden(state, "-0.029562 -0.382799 -0.383020 0.336405 -0.107698 -0.017415")
    assert_sums(state, "-20.16426")
