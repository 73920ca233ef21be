"""Videos that come in chunks: both packages, in float64 unless the dtype is what a test is about."""

import copy
from functools import cache
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from golden import fill, golden
from torch import Tensor

import fused
import reference

TOY = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_frames": 4, "num_classes": 5, "clip_output_dim": 12}
LENGTHS = (None, 1, 3, 4, 7, 12)  # of a video in tubelets; the temporal table has 4


@pytest.fixture(params=[reference, fused], ids=["reference", "fused"])
def package(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


@cache
def model_of(package: ModuleType, kind: str = "VideoMamba", **overrides):
    return golden(getattr(package, kind)(package.VideoMambaConfig(**TOY | overrides))).double()


def video(frames: int = 4, clips: int = 2) -> Tensor:
    return fill(clips, 3, frames, 32, 32, phase=7).double()


def close(got: Tensor, truth: Tensor) -> bool:
    """To 1e-12 in both norms, as float64 against float64 elsewhere in these tests."""
    assert got.shape == truth.shape and got.dtype == truth.dtype
    error = got - truth
    return bool(error.norm() <= 1e-12 * truth.norm() and error.abs().max() <= 1e-12 * truth.abs().max())


@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize("total", LENGTHS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_embedded_chunks_are_the_embedded_video(package, total, tubelet, masked):
    """CLS once, positions where they belong, and of a stretched table the same rows in every chunk."""
    model = model_of(package, num_frames=4 * tubelet, kernel_size=tubelet)
    tubelets = total or 4
    clip, mask = video(tubelets * tubelet), None
    if masked:
        mask = torch.zeros(2, 1 + tubelets * 4, dtype=torch.bool)
        mask[0, 1::4], mask[1, 2::4] = True, True
    whole = model.embed(clip, mask, temporal_pos_total=total)
    for cuts in {(0, tubelets), tuple(range(tubelets + 1)), (0, 1, tubelets) if tubelets > 1 else (0, 1)}:
        parts = []
        for start, stop in pairwise(cuts):
            part = None if mask is None else mask[:, 1 + 4 * start - (start == 0) : 1 + 4 * stop]
            chunk = clip[:, :, tubelet * start : tubelet * stop]
            parts.append(model.embed(chunk, part, temporal_pos_offset=start, temporal_pos_total=total))
        assert close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("total", LENGTHS[1:])
def test_a_stretched_table_is_upstreams(package, total):
    model = copy.deepcopy(model_of(package))
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
        model.pos_embed.zero_()
    got = model.embed(video(total), temporal_pos_total=total)[:, 1::4]
    table = model.temporal_pos_embedding
    assert close(got[0], F.interpolate(table.transpose(1, 2), size=total, mode="linear").transpose(1, 2)[0])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("frames", "how", "says"),
    [
        (2, {"temporal_pos_offset": -1}, "temporal_pos_offset is -1.*from 0 up"),
        (2, {"temporal_pos_offset": 1.0}, "temporal_pos_offset is 1.0.*from 0 up"),
        (2, {"temporal_pos_offset": True}, "temporal_pos_offset is True.*from 0 up"),
        (2, {"temporal_pos_total": 0}, "temporal_pos_total is 0.*from 1 up"),
        (3, {"temporal_pos_offset": 0}, r"3 frames.*multiples of kernel_size \(2\).*next chunk"),
        (0, {"temporal_pos_offset": 0}, r"0 frames.*multiples of kernel_size \(2\)"),
        (4, {"temporal_pos_offset": 3}, "temporal_pos_offset is 3.*past.* 4.*temporal_pos_total.*stretched"),
        (4, {"temporal_pos_offset": 5, "temporal_pos_total": 6}, "temporal_pos_offset is 5.*past.* 6.*temporal_pos_total"),
        (4, {}, r"clip has shape .*\(B, 3, 8, 32, 32\)"),
        (8, {"temporal_pos_total": 6}, r"clip has shape .*\(B, 3, 12, 32, 32\)"),
        (2, {"temporal_pos_offset": 0, "use_image": True}, "temporal_pos_offset is 0.*image"),
        (2, {"temporal_pos_total": 4, "use_image": True}, "temporal_pos_total is 4.*image"),
    ],
)  # fmt: skip
def test_a_chunk_that_is_no_part_of_the_video(package, frames, how, says):
    with pytest.raises(ValueError, match=says):
        model_of(package, num_frames=8, kernel_size=2).embed(video(frames), **how)


@pytest.mark.usefixtures("unchecked")
def test_an_image_model_has_no_time(package):
    with pytest.raises(ValueError, match="temporal_pos_offset is 0.*image"):
        model_of(package, num_frames=None).embed(video()[:, :, 0], temporal_pos_offset=0)


@pytest.mark.usefixtures("unchecked")
def test_a_chunk_of_another_size(package):
    with pytest.raises(ValueError, match=r"clip has shape .*\(B, 3, T, 32, 32\)"):
        model_of(package).embed(video()[..., :16], temporal_pos_offset=0)


@pytest.mark.usefixtures("unchecked")
def test_the_mask_of_a_chunk_is_its_own(package):
    model, chunk = model_of(package), video(2)
    with pytest.raises(ValueError, match=r"mask is torch.bool \(2, 9\); allowed is bool \(2, 8\)"):
        model.embed(chunk, torch.zeros(2, 9, dtype=torch.bool), temporal_pos_offset=2)


@pytest.mark.parametrize("order", ["temporal", "both"])
def test_a_mask_over_more_tubelets_than_the_table_has(order):
    mask = torch.zeros(2, 1 + 6 * 4, dtype=torch.bool)
    mask[0, 3], mask[1, 24] = True, True
    outputs = []
    for package in (reference, fused):
        model = model_of(package, scan_order=order)
        outputs.append(model.encode(model.embed(video(6), mask, temporal_pos_total=6), mask)[0])
    assert close(outputs[1], outputs[0])
