"""Errors of both packages for wrong input: the message names the argument, its value and the allowed values."""

import importlib
from types import ModuleType

import pytest
import torch

TOY = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_frames": 4, "num_classes": 5, "clip_output_dim": 12}
CLIP = torch.zeros(2, 3, 4, 32, 32)
MASK = torch.zeros(2, 17, dtype=torch.bool)

pytestmark = pytest.mark.usefixtures("unchecked")


def model_of(package: ModuleType, kind: str = "VideoMambaEncoder", **overrides):
    return getattr(package, kind)(package.VideoMambaConfig(**TOY | overrides))


@pytest.mark.parametrize(
    ("overrides", "shape", "wanted"),
    [
        ({}, (2, 3, 8, 32, 32), r"\(B, C, T, H, W\) = \(B, 3, 4, 32, 32\)"),
        ({}, (2, 3, 4, 32, 48), r"\(B, 3, 4, 32, 32\)"),
        ({}, (2, 4, 3, 32, 32), r"\(B, 3, 4, 32, 32\)"),
        ({}, (2, 3, 32, 32), r"\(B, 3, 4, 32, 32\)"),
        ({}, (3, 4, 32, 32), r"\(B, 3, 4, 32, 32\)"),
        ({"img_size": (32, 48), "channels": 1}, (2, 1, 4, 48, 32), r"\(B, 1, 4, 32, 48\)"),
        ({"num_frames": None}, (2, 3, 4, 32, 32), r"\(B, C, H, W\) = \(B, 3, 32, 32\)"),
        ({"num_frames": None}, (2, 3, 32, 31), r"\(B, 3, 32, 32\)"),
    ],
)
@pytest.mark.parametrize("kind", ["VideoMamba", "VideoMambaEncoder"])
def test_clip_of_another_shape(package, kind, overrides, shape, wanted):
    came = r"\(" + ", ".join(map(str, shape)) + r"\)"
    with pytest.raises(ValueError, match=f"clip has shape {came}.*{wanted}"):
        model_of(package, kind, **overrides)(torch.zeros(shape))


def test_clip_of_another_length_names_the_way_out():
    """Only where the number of frames alone is wrong, and the way out works."""
    package = importlib.import_module("fused")
    for kind in ("VideoMamba", "VideoMambaEncoder"):
        model = model_of(package, kind, kernel_size=2)
        with pytest.raises(ValueError, match=r"\(B, 3, 4, 32, 32\)\. For 12 frames pass temporal_pos_total=6: the table of"):
            model(torch.zeros(1, 3, 12, 32, 32))
        model(torch.zeros(1, 3, 12, 32, 32), temporal_pos_total=6)
        with pytest.raises(ValueError, match=r"needs a multiple of kernel_size \(2\) frames, and temporal_pos_total$"):
            model(torch.zeros(1, 3, 7, 32, 32))
        with pytest.raises(ValueError, match=r"\(B, 3, 8, 32, 32\) for temporal_pos_total=4; of a chunk pass temporal_pos_off"):
            model(torch.zeros(1, 3, 12, 32, 32), temporal_pos_total=4)
        for wrong in ((1, 3, 12, 32, 16), (1, 4, 12, 32, 32), (3, 12, 32, 32)):
            with pytest.raises(ValueError, match=r"\(B, 3, 4, 32, 32\)$"):
                model(torch.zeros(wrong))
        image = model_of(package, kind, num_frames=None)
        with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\)$"):
            image(torch.zeros(1, 3, 12, 32, 32))
    with pytest.raises(ValueError, match=r"\(B, 3, 2, 32, 32\)$"):
        model(torch.zeros(1, 3, 12, 32, 32), use_image=True)


def test_clip_of_bytes(package):
    with pytest.raises(TypeError, match="torch.uint8.*floating-point"):
        model_of(package)(CLIP.to(torch.uint8))


@pytest.mark.parametrize("kind", ["VideoMamba", "VideoMambaEncoder"])
def test_clip_of_another_dtype_than_the_model(package, kind):
    model = model_of(package, kind)
    with pytest.raises(TypeError, match="torch.float64, parameters torch.float32; allowed: the same, or torch.autocast"):
        model(CLIP.double())
    with torch.autocast("cpu", torch.bfloat16):
        model(CLIP.bfloat16())


def test_image_of_more_than_a_tubelet(package):
    with pytest.raises(ValueError, match=r"clip has shape .*\(B, 3, 2, 32, 32\)"):
        model_of(package, kernel_size=2)(CLIP, use_image=True)


def with_hidden(*places: tuple[int, int]) -> torch.Tensor:
    mask = MASK.clone()
    for place in places:
        mask[place] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (MASK[:, 1:], r"mask is torch.bool \(2, 16\).*17"),
        (MASK[0], r"mask is torch.bool \(17,\).*17"),
        (MASK.long(), r"mask is torch.int64 \(2, 17\).*bool"),
        (with_hidden((1, 0), (0, 3)), "CLS"),
        (with_hidden((1, 4)), "between 16 and 17 tokens; allowed: the same number in every clip"),
    ],
    ids=["short", "one clip", "integers", "CLS hidden", "unequal"],
)
def test_mask(package, mask, says):
    model = model_of(package)
    with pytest.raises(ValueError, match=says):
        model(CLIP, mask)
    with pytest.raises(ValueError, match=says):
        model.embed(CLIP, mask)


def test_mask_of_other_clips(package):
    with pytest.raises(ValueError, match=r"mask is torch.bool \(3, 17\); allowed is bool \(2, 17\)"):
        model_of(package)(CLIP, torch.zeros(3, 17, dtype=torch.bool))


def test_mask_of_a_clip_for_an_image(package):
    with pytest.raises(ValueError, match="mask"):
        model_of(package)(CLIP[:, :, :1], MASK, use_image=True)


def test_keep_temporal_needs_equal_tubelets(package):
    mask = with_hidden((0, 1), (1, 5))
    with pytest.raises(ValueError, match="keep_temporal is True.*15 visible.*4 equal tubelets; allowed: .*keep_temporal=False"):
        model_of(package)(CLIP, mask, keep_temporal=True)
    assert model_of(package, pool_type="cls")(CLIP, mask, keep_temporal=True).pooled.shape == (2, 1, 32)


@pytest.mark.parametrize("order", ["temporal", "alternating", "both"])
def test_a_state_needs_the_spatial_order(package, order):
    model = model_of(package, "VideoMamba", bimamba=False, readout="last", scan_order=order)
    with pytest.raises(ValueError, match=f"scan_order is '{order}'.*'spatial'"):
        model.encode(model.embed(CLIP), return_state=True)


def test_a_bidirectional_model_has_no_state(package):
    model = model_of(package, "VideoMamba")
    tokens, mixer = model.embed(CLIP), model.layers[0].mixer
    state = (torch.zeros(2, 64, 3), torch.zeros(2, 64, 16))
    calls = [
        lambda: mixer(tokens, return_state=True),
        lambda: mixer(tokens, state=state),
        lambda: model.encode(tokens, return_state=True),
        lambda: model.encode(tokens, state=[state, state]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="future.*whole clip.*bimamba=False"):
            call()


def test_a_state_of_other_layers(package):
    model = model_of(package, "VideoMamba", bimamba=False, readout="last")
    with pytest.raises(ValueError, match=r"state has 1 entries; allowed: one per layer \(2\)"):
        model.encode(model.embed(CLIP), state=[(torch.zeros(2, 64, 3), torch.zeros(2, 64, 16))])


def test_tokens_of_a_mask_without_the_mask(package):
    model = model_of(package, scan_order="temporal")
    with pytest.raises(ValueError, match="tokens are 16; allowed: CLS and frames of 4 patches, or the mask"):
        model.encode(torch.zeros(2, 16, 32))


def test_dt_init(package):
    with pytest.raises(ValueError, match="dt_init is 'zeros'.*'random'.*'constant'"):
        package.Mamba(32, dt_init="zeros")


@pytest.mark.parametrize("make", [lambda f, n: f.Mamba(32, backend=n), lambda f, n: model_of_backend(f, n)])
def test_a_backend_that_is_none(make):
    with pytest.raises(ValueError, match="backend is 'cuda'; allowed: 'auto', 'native', 'native_kept', 'cpu', 'mamba_ssm'"):
        make(importlib.import_module("fused"), "cuda")


def model_of_backend(fused: ModuleType, backend: str, **overrides):
    return fused.VideoMamba(fused.VideoMambaConfig(**TOY | overrides), backend=backend)


@pytest.mark.parametrize("backend", ["native", "mamba_ssm", "mamba_ssm_inner"])
def test_a_backend_that_cannot_run_here(backend):
    fused = importlib.import_module("fused")
    model = model_of_backend(fused, backend)
    for call in (lambda: model(CLIP), lambda: fused.Mamba(32, backend=backend)(torch.zeros(1, 3, 32))):
        with pytest.raises(fused.BackendError, match=f"(?s){backend}.*torch"):
            call()
    assert model.backend == backend


@pytest.mark.parametrize("backend", ["mamba_ssm", "mamba_ssm_inner"])
def test_a_backend_that_cannot_carry_a_state(backend):
    model = model_of_backend(importlib.import_module("fused"), backend, bimamba=False, readout="last")
    tokens, state = torch.zeros(2, 17, 32), (torch.zeros(2, 64, 3), torch.zeros(2, 64, 16))
    for call in (
        lambda: model.encode(tokens, state=[state, state]),
        lambda: model.layers[0].mixer(tokens, state=state),
    ):
        with pytest.raises(ValueError, match=f"'{backend}' does not support initial_state; use backend='torch'"):
            call()
    if backend == "mamba_ssm_inner":
        with pytest.raises(ValueError, match="does not return a state; use backend='torch'"):
            model.layers[0].mixer(tokens, return_state=True)
