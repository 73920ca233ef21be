"""Initial values in half precision: the values of float32, rounded, without the outliers of older PyTorch versions."""

import pytest
import torch

from fused import VideoMamba, VideoMambaConfig
from fused.runtime.initial_values import trunc_normal_

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_is_rounded_float32(dtype):
    torch.manual_seed(0)
    want = torch.nn.init.trunc_normal_(torch.empty(300, 200), std=0.02)
    torch.manual_seed(0)
    weight = torch.empty(300, 200, dtype=dtype, requires_grad=True)
    assert trunc_normal_(weight, std=0.02) is weight and weight.grad_fn is None
    assert torch.equal(weight, want.to(dtype)) and weight.abs().max() < 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_precision_keeps_its_bits(dtype):
    torch.manual_seed(0)
    want = torch.nn.init.trunc_normal_(torch.empty(30, 20, dtype=dtype), std=0.02)
    torch.manual_seed(0)
    assert torch.equal(trunc_normal_(torch.empty(30, 20, dtype=dtype), std=0.02), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_made_in_half_precision_has_no_outliers(dtype):
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = VideoMamba(VideoMambaConfig.tiny(num_classes=10, img_size=32, depth=1))
    finally:
        torch.set_default_dtype(default)
    assert model.head.weight.dtype == dtype
    for weight in (model.pos_embed, model.head.weight, model.layers[0].mixer.in_proj.weight):
        assert 0.01 < weight.float().std() < 0.03 and weight.abs().max() < 0.15
