"""Published weights find their way into a model whatever they are wrapped in, and every tensor is accounted for."""

import argparse
import logging
import os
import pickle
import time

import pytest
import torch
import torch.nn.functional as F
from golden import fill, golden

import fused
from fused import (
    CheckpointError,
    VideoMamba,
    VideoMambaConfig,
    VideoMambaEncoder,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from fused.models.videomamba.resize import inflate_kernel, resize_frames, resize_grid

pytest.importorskip("safetensors", reason="safetensors is not installed")
TOY = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_frames": 4, "num_classes": 5, "clip_output_dim": 12}
IMAGE = {"num_frames": None}


def toy(kind=VideoMamba, **overrides):
    return kind(VideoMambaConfig(**TOY | overrides))


def trained(kind=VideoMamba, **overrides):
    return golden(toy(kind, **overrides)).state_dict()


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) and value.dtype == other[name].dtype for name, value in one.items())


def ahead(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


OTHERS = {
    "clip_teacher.proj": torch.ones(2),
    "text_encoder.bert.x": torch.ones(2),
    "temp": torch.ones(()),
    "itm_head.bias": torch.ones(2),
}
LAYOUTS = {
    "bare": lambda w: w,
    "model": lambda w: {"model": w, "epoch": 3},
    "module": lambda w: {"module": w},
    "model-module": lambda w: {"model": {"module": w}},
    "trainer": lambda w: {"model": w, "optimizer": {"state": {0: torch.ones(2)}}, "args": argparse.Namespace(lr=0.1)},
    **{
        prefix: lambda w, prefix=prefix: ahead(prefix, w)
        for prefix in ("module.", "_orig_mod.", "vision_encoder.", "backbone.", "encoder.", "student.", "module.encoder.")
    },
    "video-text": lambda w: {"model": ahead("vision_encoder.", w) | OTHERS},
    "finetune": lambda w: {name if name.startswith("head") else "backbone." + name: value for name, value in w.items()},
    "student-teacher": lambda w: ahead("student.", w) | ahead("teacher.", w),
}
KINDS = {
    "video_sm": (VideoMamba, {}),
    "image_sm": (VideoMamba, IMAGE),
    "distilled": (VideoMamba, IMAGE | {"distill_dim": 9}),
    "pretrain": (VideoMambaEncoder, {"add_pool_norm": False, "clip_return_layer": 2}),
    "video_mm": (VideoMambaEncoder, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, layout, tmp_path):
    """From the layout into a model, out in either format, and in again: bit for bit."""
    cls, overrides = KINDS[kind]
    weights = trained(cls, **overrides)
    torch.save(LAYOUTS[layout](weights), tmp_path / "published.pth")
    model = toy(cls, **overrides)
    report = load_checkpoint(model, tmp_path / "published.pth")
    same(model.state_dict(), weights)
    assert sorted(report.loaded) == sorted(weights) and not report.converted and not report.initial
    extra = {"model": {"epoch"}, "trainer": {"optimizer", "args"}, "video-text": set(OTHERS)}.get(layout, set())
    assert set(report.dropped) == (set(ahead("teacher.", weights)) if layout == "student-teacher" else extra)
    for name in ("own.safetensors", "own.pth"):
        again = toy(cls, **overrides)
        load_checkpoint(again, save_checkpoint(model, tmp_path / name))
        same(again.state_dict(), weights)


def test_report_prints_what_became_of_every_tensor(caplog):
    weights = trained(**IMAGE)
    with caplog.at_level(logging.INFO, "fused"):
        report = load_checkpoint(toy(num_classes=3, img_size=64), {"model": weights, "optimizer": {}})
    text = str(report)
    for words in (
        "under 'model'", "pos_embed: 2x2 to 4x4 patches, bicubic", "patch_embed.proj.weight: inflated to 1 frame(s), centre",
        "left at init: head.weight, head.bias: the checkpoint's head has 5 classes, the model's 3",
        "left at init: temporal_pos_embedding: the checkpoint is of an image model", "dropped: optimizer: beside 'model'",
    ):  # fmt: skip
        assert words in text
    assert set(report.loaded) | set(report.converted) | set(report.initial) == set(toy().state_dict())
    assert set(report.loaded) | set(report.converted) | set(report.dropped) == set(weights) | {"optimizer"}
    assert [(r.levelname, str(report) == r.getMessage()) for r in caplog.records] == [("WARNING", True)]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fused"):
        load_checkpoint(toy(**IMAGE), weights)
    assert not caplog.records


def test_dtypes_are_converted_and_said():
    weights = {name: value.bfloat16() for name, value in trained(VideoMambaEncoder).items()}  # as video_mm keeps them
    model = toy(VideoMambaEncoder)
    report = load_checkpoint(model, weights)
    same(model.state_dict(), {name: value.float() for name, value in weights.items()})
    assert set(report.converted.values()) == {"bfloat16 to float32"} and not report.loaded
    half = toy(VideoMambaEncoder).bfloat16()
    assert not load_checkpoint(half, weights).converted
    same(half.state_dict(), weights)


@pytest.mark.parametrize("source, target", [(VideoMambaEncoder, VideoMamba), (VideoMamba, VideoMambaEncoder)])
def test_final_norm_has_two_names(source, target):
    weights, model = trained(source), toy(target)
    report = load_checkpoint(model, weights)
    ours, theirs = ("norm_f.weight", "norm.weight") if target is VideoMamba else ("norm.weight", "norm_f.weight")
    assert torch.equal(model.state_dict()[ours], weights[theirs]) and theirs.removesuffix("weight") in report.converted[ours]
    parts = {"head", "pool_norm", "clip_decoder"}
    assert {n.partition(".")[0] for n in report.initial} | {n.partition(".")[0] for n in report.dropped} == parts
    both = weights | {ours: weights[theirs] + 1}
    with pytest.raises(CheckpointError, match=f"not in the model: {theirs}"):
        load_checkpoint(model, both)


@pytest.mark.parametrize("grid, size", [((2, 2), (48, 80)), ((3, 5), 64), ((3, 5), (80, 48))])
def test_positions_of_another_grid(grid, size):
    weights, model = trained(img_size=tuple(16 * side for side in grid)), toy(img_size=size)
    report = load_checkpoint(model, weights, grid=None if grid == (2, 2) else grid)
    got, after = model.pos_embed.detach(), model.config.grid
    rows = weights["pos_embed"][0, 1:].T.view(1, 32, *grid)
    wanted = F.interpolate(rows, size=after, mode="bicubic", align_corners=False)
    assert torch.equal(got[0, 1:], wanted[0].flatten(1).T) and torch.equal(got[:, 0], weights["pos_embed"][:, 0])
    assert report.converted == {"pos_embed": "{}x{} to {}x{} patches, bicubic".format(*grid, *after)}


def test_interpolation_keeps_its_dtype_and_what_it_must():
    """In half precision the rounding comes last; the same size changes no bit; frames lie at the middle of their time."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = fill(1, 7, 3, phase=3).to(dtype)
        assert resize_grid(x, (2, 3), (5, 4)).dtype == resize_frames(x, 4).dtype == dtype
    low = fill(1, 17, 6, phase=1).bfloat16()
    assert torch.equal(resize_grid(low, (4, 4), (6, 5)), resize_grid(low.float(), (4, 4), (6, 5)).bfloat16())
    assert torch.equal(resize_frames(low, 9), resize_frames(low.float(), 9).bfloat16())
    x = fill(1, 17, 6, phase=2)
    assert torch.equal(resize_grid(x, (4, 4), (4, 4)), x) and torch.equal(resize_frames(x, 17), x)
    line = torch.arange(8.0).view(1, 8, 1)
    assert torch.equal(resize_frames(line, 16)[0, :, 0], (torch.arange(16.0) / 2 - 0.25).clamp(0, 7))


@pytest.mark.parametrize("frames, tubelet", [(8, 1), (2, 1), (4, 2)])
def test_positions_of_another_number_of_frames(frames, tubelet):
    weights = trained(kernel_size=tubelet)
    model = toy(num_frames=frames, kernel_size=tubelet)
    report = load_checkpoint(model, weights)
    table = weights["temporal_pos_embedding"]
    if frames == 4:
        assert torch.equal(model.temporal_pos_embedding, table) and not report.converted
        return
    wanted = F.interpolate(table.transpose(1, 2), size=frames, mode="linear", align_corners=False).transpose(1, 2)
    assert torch.equal(model.temporal_pos_embedding, wanted)
    assert report.converted == {"temporal_pos_embedding": f"4 to {frames} time steps, linear"}


@pytest.mark.parametrize("tubelet", [1, 2, 3])
def test_inflated_kernels(tubelet):
    kernel = fill(3, 2, 4, 4, phase=5)
    centre, mean = (inflate_kernel(kernel, tubelet, how) for how in ("centre", "mean"))
    assert torch.equal(centre[:, :, tubelet // 2], kernel) and centre.count_nonzero() == kernel.count_nonzero()
    assert all(torch.equal(mean[:, :, t], kernel / tubelet) for t in range(tubelet))
    assert centre.shape == mean.shape == (3, 2, tubelet, 4, 4)
    with pytest.raises(ValueError, match="'copy'; allowed: 'centre', 'mean'"):
        inflate_kernel(kernel, tubelet, "copy")


@pytest.mark.parametrize("tubelet", [1, 2, 4])
@pytest.mark.parametrize("inflate", ["mean", "centre"])
def test_inflated_model_is_the_image_model_on_a_still_clip(inflate, tubelet):
    """One tubelet and no temporal position: both see the same patches; in float64, so that only rounding is between them."""
    image = golden(toy(**IMAGE)).double()
    model = toy(num_frames=tubelet, kernel_size=tubelet).double().eval()
    load_checkpoint(model, image.state_dict(), inflate=inflate)
    picture = fill(2, 3, 32, 32, phase=7).double()
    still = picture.unsqueeze(2).expand(-1, -1, tubelet, -1, -1)
    wanted, got = image(picture), model(still)
    bound = 64 * torch.finfo(torch.float64).eps * wanted.abs().max()
    assert (got - wanted).abs().max() <= bound
    moving = still.clone()
    moving[:, :, 0] += 1
    if tubelet > 1:
        assert ((model(moving) - wanted).abs().max() <= bound) == (inflate == "centre")


def test_head_of_another_size_stays_as_it_was():
    model, weights = toy(num_classes=7), trained()
    before = model.head.weight.clone()
    report = load_checkpoint(model, weights)
    assert torch.equal(model.head.weight, before) and set(report.initial) == {"head.weight", "head.bias"} <= set(report.dropped)
    assert set(load_checkpoint(toy(num_classes=0), weights).dropped) == {"head.weight", "head.bias"}
    assert set(load_checkpoint(toy(), trained(num_classes=0)).initial) == {"head.weight", "head.bias"}
    assert set(load_checkpoint(toy(**IMAGE), trained(**IMAGE, distill_dim=9)).dropped) == {
        f"distill_head.{name}" for name in ("0.weight", "1.weight", "1.bias")
    }


def losing(*names):
    return lambda weights: {name: value for name, value in weights.items() if name not in names}


MISFITS = {
    "lost": (losing("layers.1.mixer.A_log", "norm_f.weight"), "not in the checkpoint: layers.1.mixer.A_log, norm_f.weight"),
    "half-a-head": (losing("head.bias"), "not in the checkpoint: head.bias"),
    "no-frames": (losing("temporal_pos_embedding"), "not in the checkpoint: temporal_pos_embedding"),
    "left-over": (lambda w: w | {"layers.0.mixer.gamma": torch.ones(32)}, r"not in the model: layers.0.mixer.gamma \(32,\)"),
    "shape": (
        lambda w: w | {"layers.0.mixer.D": torch.ones(5)},
        r"of another shape: layers.0.mixer.D \(checkpoint \(5,\), model \(64,\)\)",
    ),
    "deeper": (lambda w: trained(depth=3), r"depth 3, the model 32 and 2\n.*layers.2.mixer.A_b_log.* and 12 more"),
    "wider": (lambda w: trained(embed_dim=48), "it has embed_dim 48 and depth 2, the model 32 and 2"),
    "one-way": (lambda w: trained(bimamba=False, readout="mean"), "not in the checkpoint: layers.0.mixer.A_b_log"),
    "tubelet": (lambda w: trained(kernel_size=2), "of another shape: patch_embed.proj.weight"),
}


@pytest.mark.parametrize("harm, words", MISFITS.values(), ids=MISFITS)
def test_strict_says_what_does_not_fit_and_changes_nothing(harm, words):
    model, weights = golden(toy()), harm(trained())
    with torch.no_grad():
        [p.add_(1) for p in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(model, weights)
    same(model.state_dict(), before)


@pytest.mark.parametrize("name", ["lost", "left-over", "shape", "deeper", "one-way", "tubelet"])
def test_without_strict_the_rest_is_loaded_and_all_of_it_reported(name):
    model, weights = toy(), MISFITS[name][0](trained())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_checkpoint(model, weights, strict=False)
    assert set(report.converted) == {"temporal_pos_embedding"} & set(weights) if name == "tubelet" else not report.converted
    same({n: v for n, v in model.state_dict().items() if n in report.loaded}, {n: weights[n] for n in report.loaded})
    same({n: v for n, v in model.state_dict().items() if n in report.initial}, {n: before[n] for n in report.initial})
    used = {*report.loaded, *report.converted}
    assert used | set(report.initial) == set(before) and used | set(report.dropped) == set(weights)


def test_what_is_no_checkpoint_of_this_model():
    model, weights = toy(), trained()
    for strict in (True, False):  # nothing of it fits: no report can make that good
        with pytest.raises(CheckpointError, match="does not fit"):
            load_checkpoint(model, {"conv1.weight": torch.ones(3)}, strict=strict)
        with pytest.raises(CheckpointError, match="'state', 'epoch'. Weights are expected there, or under one of 'model'"):
            load_checkpoint(model, {"state": weights, "epoch": 2}, strict=strict)
        with pytest.raises(CheckpointError, match="'cls_token' and 'encoder.cls_token' are both 'cls_token' without"):
            load_checkpoint(model, weights | ahead("encoder.", weights), strict=strict)
    with pytest.raises(CheckpointError, match=r"15 patches, no square; pass the checkpoint's grid=\(rows, columns\)"):
        load_checkpoint(model, trained(img_size=(48, 80)))
    with pytest.raises(ValueError, match=r"grid is \(2, 3\); pos_embed \(1, 5, 32\) has 4 patches and CLS"):
        load_checkpoint(toy(img_size=64), weights, grid=(2, 3))
    with pytest.raises(ValueError, match="inflate is 'copy'"):
        load_checkpoint(model, trained(**IMAGE), inflate="copy")
    with pytest.raises(TypeError, match="model must be a VideoMamba or VideoMambaEncoder, got Linear"):
        load_checkpoint(torch.nn.Linear(2, 2), weights)


class Harmful:
    """A pickle that would run a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_a_pickle_with_code_is_refused(tmp_path, old):
    path, marker = tmp_path / "harmful.pth", tmp_path / "marker"
    torch.save({"model": trained(), "x": Harmful(marker)}, path, _use_new_zipfile_serialization=not old)
    for call in (lambda: read_checkpoint(path), lambda: load_checkpoint(toy(), path, strict=False)):
        with pytest.raises(CheckpointError, match=r"is refused.*(posix|nt)\.system"):
            call()
    path.write_bytes(pickle.dumps(Harmful(marker)))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not marker.exists()
    torch.save({"model": trained(), "x": torch.Generator}, path)
    with pytest.raises(CheckpointError, match="is refused"):
        read_checkpoint(path)


def test_files_that_cannot_be_read(tmp_path):
    whole = save_checkpoint(toy(), tmp_path / "whole.pth").read_bytes()
    tensors = save_checkpoint(toy(), tmp_path / "whole.safetensors").read_bytes()
    for name, content in {"cut.pth": whole[: len(whole) // 2], "junk.pth": b"hello" * 99, "empty.pth": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name} .*damaged"):
            read_checkpoint(tmp_path / name)
    for content in (tensors[:-9], whole, b""):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="no safetensors file, or it is damaged"):
            read_checkpoint(tmp_path / "bad.safetensors")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list; a checkpoint is a dictionary"):
        read_checkpoint(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_checkpoint(toy(), tmp_path / "nowhere.pth")
    with pytest.raises(TypeError, match="epoch is a int; safetensors holds tensors only"):
        save_checkpoint({"epoch": 3}, tmp_path / "x.safetensors")


def test_a_trainers_state_can_be_saved_and_read(tmp_path):
    model = toy()
    optimizer = torch.optim.AdamW(model.parameters())
    model(fill(1, 3, 4, 32, 32, phase=7)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    path = save_checkpoint(state, tmp_path / "a/b/t.pth")
    content = read_checkpoint(path)
    assert content["epoch"] == 3
    optimizer.load_state_dict(content["optimizer"])
    assert set(load_checkpoint(toy(), path).dropped) == {"optimizer", "epoch"}


def test_old_drafts_go_and_young_ones_stay(tmp_path):
    """What a killed process left is not kept for ever, and what another is writing is not taken from it."""
    path = tmp_path / "a.pth"
    for name, age in (("old", 7200), ("young", 60)):
        draft = tmp_path / f".a.pth.{name}.part"
        draft.write_bytes(b"half")
        os.utime(draft, (time.time() - age,) * 2)
    (tmp_path / ".ab.pth.old.part").write_bytes(b"another's")
    save_checkpoint({"x": torch.ones(2)}, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.pth.young.part", ".ab.pth.old.part", "a.pth"]


def test_files_have_the_rights_that_the_user_asked_for(tmp_path):
    before = os.umask(0o027)
    try:
        paths = [save_checkpoint({"x": torch.ones(2)}, tmp_path / name) for name in ("a.pth", "a.safetensors")]
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o640] * 2


def test_the_builder_takes_every_layout(tmp_path):
    config = VideoMambaConfig(**TOY | {"num_frames": 8}, pretrained=str(tmp_path / "image.pth"))
    torch.save({"model": trained(**IMAGE)}, tmp_path / "image.pth")
    model = fused.build_videomamba(config)
    assert torch.equal(model.norm.weight, trained(**IMAGE)["norm_f.weight"])
