"""The ViT baseline: timm's parameters and numbers, VideoMamba's tokens, and how it is judged."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import fill, golden
from torch import Tensor
from torch.nn import MultiheadAttention
from typer.testing import CliRunner

import fused
from harness.baselines import attention
from harness.baselines.vit import ViT, ViTConfig
from harness.bench import workloads
from harness.cli.app import app
from harness.records.speed import Entry, Point
from harness.runs.conclude import FAILED, PASSED
from harness.runs.store import Run
from harness.subjects import vit

TOY = {"img_size": 32, "num_frames": 3, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 3}


def toy(**overrides) -> ViT:
    return golden(ViT(ViTConfig(**TOY | overrides))).double()


def clip_of(config: ViTConfig, clips: int = 2) -> Tensor:
    frames = () if config.num_frames is None else (config.num_frames,)
    return fill(clips, 3, *frames, config.img_size, config.img_size, phase=7).double()


def assert_close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape and (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@pytest.mark.parametrize(("size", "count"), [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656)])
def test_timms_names_shapes_and_counts(size: str, count: int) -> None:
    with torch.device("meta"):
        image, video = (ViT(getattr(ViTConfig, size)(num_frames=frames)).state_dict() for frames in (None, 16))
    D = image["cls_token"].shape[2]
    due = {
        "cls_token": (1, 1, D), "pos_embed": (1, 197, D), "patch_embed.proj.weight": (D, 3, 16, 16),
        "patch_embed.proj.bias": (D,), "norm.weight": (D,), "norm.bias": (D,), "head.weight": (1000, D), "head.bias": (1000,),
    }  # fmt: skip
    layers = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
    for block in (f"blocks.{i}" for i in range(12)):
        due |= {f"{block}.{norm}.{leaf}": (D,) for norm in ("norm1", "norm2") for leaf in ("weight", "bias")}
        due |= {f"{block}.{layer}.weight": shape for layer, shape in layers.items()}
        due |= {f"{block}.{layer}.bias": shape[:1] for layer, shape in layers.items()}
    assert {name: tuple(p.shape) for name, p in image.items()} == due
    assert sum(p.numel() for p in image.values()) == count
    assert {name: tuple(p.shape) for name, p in video.items()} == due | {"temporal_pos_embedding": (1, 16, D)}


@pytest.mark.parametrize("frames", [None, 3])
def test_sdpa_equals_naive_attention(frames: int | None) -> None:
    results = []
    for kind in ("naive", "sdpa"):
        model = toy(num_frames=frames, attention=kind)
        logits = model(clip_of(model.config))
        (logits * fill(*logits.shape, phase=3)).sum().backward()
        results.append((logits, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert_close(results[1][0], results[0][0])
    assert_close(results[1][1], results[0][1])


def test_one_block_computed_another_way() -> None:
    """With a convolution for the patches, PyTorch's MultiheadAttention, and norm and GELU from their definitions."""
    model = toy(num_frames=None, depth=1, attention="naive")
    w, images = model.state_dict(), clip_of(model.config)

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.einsum("...i,oi->...o", x, w[f"{name}.weight"]) + w[f"{name}.bias"]

    patches = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16).flatten(2).mT
    x = torch.cat((w["cls_token"].expand(len(images), 1, -1), patches), dim=1) + w["pos_embed"]
    mixer = MultiheadAttention(24, 3, batch_first=True, dtype=torch.float64)
    names = {"in_proj_": "qkv.", "out_proj.": "proj."}
    theirs = {a + leaf: w[f"blocks.0.attn.{b}{leaf}"] for a, b in names.items() for leaf in ("weight", "bias")}
    mixer.load_state_dict(theirs, strict=True)
    normed = norm(x, "blocks.0.norm1")
    x = x + mixer(normed, normed, normed)[0]
    hidden = linear(norm(x, "blocks.0.norm2"), "blocks.0.mlp.fc1")
    x = x + linear(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, "blocks.0.mlp.fc2")
    assert_close(model(images), linear(norm(x, "norm")[:, 0], "head"))


@pytest.mark.parametrize("frames", [None, 3])
def test_tokens_are_videomambas(frames: int | None) -> None:
    model = toy(num_frames=frames)
    fields = {name: TOY[name] for name in ("img_size", "num_classes", "embed_dim", "depth")}
    theirs = fused.VideoMamba(fused.VideoMambaConfig(**fields, num_frames=frames)).double()
    shared = {name: p for name, p in model.state_dict().items() if "pos_embed" in name or name.startswith(("cls", "patch"))}
    assert len(shared) == (4 if frames is None else 5)
    if frames is not None:
        shared["patch_embed.proj.weight"] = shared["patch_embed.proj.weight"].unsqueeze(2)
    assert not theirs.load_state_dict(shared, strict=False).unexpected_keys
    clip = clip_of(model.config)
    tokens = model.embed(clip)
    assert tokens.shape == (2, model.config.tokens, 24)
    assert_close(tokens, theirs.embed(clip))


def test_time_enters_by_its_embedding_alone() -> None:
    """Frames and their embeddings may change places together; without embeddings the order of frames says nothing."""
    model, order = toy(), torch.tensor([2, 0, 1])
    clip = clip_of(model.config)
    logits = model(clip).detach()
    assert (model(clip[:, :, order]) - logits).abs().max() > 1e-3
    with torch.no_grad():
        model.temporal_pos_embedding.copy_(model.temporal_pos_embedding[:, order])
    assert_close(model(clip[:, :, order]), logits)
    with torch.no_grad():
        model.temporal_pos_embedding.zero_()
    assert_close(model(clip[:, :, order]), model(clip))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("wrong", "allowed"),
    [
        ({"img_size": 40}, "a multiple of patch_size (16)"), ({"num_frames": 0}, "or None"), ({"depth": True}, "positive"),
        ({"embed_dim": 24.0}, "positive integer"), ({"num_heads": 5}, "a divisor of embed_dim (24)"),
        ({"num_classes": -1}, "positive integer"), ({"attention": "math"}, "one of naive, sdpa, cudnn, flash, efficient"),
    ],
)  # fmt: skip
def test_wrong_fields_say_what_is_allowed(wrong: dict, allowed: str) -> None:
    with pytest.raises(ValueError) as raised:
        ViTConfig(**TOY | wrong)
    assert next(iter(wrong)) in str(raised.value) and allowed in str(raised.value)


@pytest.mark.usefixtures("unchecked")
def test_wrong_clips_say_what_is_allowed() -> None:
    video, image = toy(), toy(num_frames=None)
    wrong = ((video, (2, 3, 2, 32, 32)), (video, (2, 3, 32, 32)), (image, (2, 3, 32, 48)), (image, (2, 3, 1, 32, 32)))
    for model, shape in wrong:
        with pytest.raises(ValueError, match=r"this model takes \(B, 3, (3, )?32, 32\)"):
            model(torch.zeros(shape))
    with pytest.raises(TypeError, match="floating-point"):
        image(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_only_the_reference_is_ours_and_inabilities_are_declared() -> None:
    first, *rest = vit.implementations()
    assert (first.name, first.role) == ("reference", "ours") and {i.role for i in rest} == {"rival"}
    assert [i.name for i in rest] == ["sdpa", "cudnn", "flash", "efficient", "timm"]
    able = {i.name: [(c.dtype, c.has("image")) for c in vit.cases("full") if i.missing(c) is None] for i in rest}
    dtypes = {name: {dtype for dtype, _ in said} for name, said in able.items()}
    assert dtypes["flash"] == dtypes["cudnn"] == {"bfloat16", "float16"}
    assert dtypes["efficient"] == {"bfloat16", "float16", "float32"} and dtypes["sdpa"] == dtypes["efficient"] | {"float64"}
    assert able["timm"] and all(image for _, image in able["timm"])
    assert all(i.absent("cpu") for i in rest if i.name in attention.PINNED) and rest[0].absent("cpu") is None


def deaf(config: dict) -> ViT:
    """A ViT that does not hear the last token."""
    model = ViT(ViTConfig(**config))
    model.embed = lambda clip: ViT.embed(model, clip)[:, :-1]
    return model


@pytest.mark.parametrize("rival", [False, True])
def test_a_wrong_vit_is_caught(rival: bool, tmp_path: Path) -> None:
    options = ["--subject", "vit", "--case", "B2-*-float32", "--check", "forward", "--with", "vit:deaf=test_vit:deaf"]
    options += ["--impl", "deaf", "--impl", "sdpa", "--out", str(tmp_path)] + ["--rival", "deaf"] * rival
    done = CliRunner().invoke(app, ["parity", "--grid", "smoke", "--device", "cpu", *options])
    assert done.exit_code == (PASSED if rival else FAILED), done.output
    assert {(r.implementation, r.status) for r in Run.open(tmp_path).records} == {("sdpa", "pass"), ("deaf", "fail")}


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_equal_to_timm(size: str) -> None:
    if reason := vit.timm_missing():
        pytest.skip(reason)
    import timm

    theirs = golden(timm.create_model(f"vit_{size}_patch16_224")).double()
    ours = ViT(getattr(ViTConfig, size)(num_frames=None)).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = clip_of(ours.config, clips=1)
    with torch.no_grad():
        assert_close(ours(images), theirs(images))


@pytest.mark.parametrize(("subject", "implementation"), [("vit", "sdpa"), ("videomamba", "fused:torch")])
def test_blocks_are_timed_on_tokens_of_any_length(subject: str, implementation: str) -> None:
    point = Point("tiny", (("B", 2), ("L", 6)), "infer", dtype="float32")
    out = workloads.make(point, Entry(subject, implementation, "rival", variant="tiny"), "cpu").run()
    assert out.shape == (2, 6, 192) and out.isfinite().all() and out.std() > 0.1
