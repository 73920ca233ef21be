"""CLIP as a teacher and BERT as a text encoder: transformers' own classes, small and with random weights."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rule import assert_rule
from torch import Tensor, nn
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel
from transformers import CLIPVisionModelWithProjection as Projected

from fused import VideoMambaConfig, VideoMambaEncoder
from fused.io.video import MEAN, STD
from fused.train import (
    ClipTeacher,
    TextEncoder,
    alignment_loss,
    attention_mask,
    contrastive_loss,
    keep_visible,
    mask_words,
    masked_language_loss,
    matching_loss,
    matching_pairs,
    similarity,
)

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 8, "projection_dim": 12}
STUDENT = VideoMambaConfig(
    img_size=32, patch_size=8, depth=2, embed_dim=24, num_frames=4, kernel_size=2, clip_output_dim=12, clip_return_layer=2
)
VOCABULARY = 60
SEEDS = range(4)


def clip(kind: type = Projected, **other: Any) -> nn.Module:
    torch.manual_seed(0)
    model = kind(CLIPVisionConfig(**VISION | other))
    for parameter in model.parameters():  # transformers' are so small that attention would be even
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model


def clips(seed: int = 1, size: int = 32) -> Tensor:
    return torch.randn(2, 3, 4, size, size, generator=torch.Generator().manual_seed(seed))


def own(kind: type, batch: Tensor, dtype: torch.dtype, layers: tuple[int, ...] = (1, 2)) -> dict[str, Tensor]:
    """Return transformers' own output in a precision, with eager attention, for the first frame of each tubelet.

    Frames are renormalised from ImageNet's values to CLIP's, as CLIP's own processor does.
    """
    model, batch = clip(kind, attn_implementation="eager").to(dtype).eval(), batch.to(dtype)
    mean, std, clip_mean, clip_std = (
        torch.tensor(x, dtype=dtype)[:, None, None]
        for x in (MEAN, STD, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    frames = [(batch[:, :, i] * std + mean - clip_mean) / clip_std for i in (0, 2)]
    with torch.no_grad():
        seen = [model(frame, output_hidden_states=True, output_attentions=True) for frame in frames]
        project = model.visual_projection if kind is Projected else nn.Identity()
        features = []
        for layer in layers:
            tokens = [project(out.hidden_states[layer + 1]) for out in seen]
            whole = torch.cat((sum(x[:, :1] for x in tokens) / 2, *(x[:, 1:] for x in tokens)), dim=1)
            features.append(whole / whole.norm(dim=-1, keepdim=True))
    attention = torch.stack([out.attentions[-1][:, :, 0, 1:].mean(1) for out in seen], dim=1)
    return {"features": torch.stack(features), "attention": attention}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [Projected, CLIPVisionModel])
def test_features_and_attention_are_transformers_own(kind: type, attention: str) -> None:
    teacher = ClipTeacher(clip(kind, attn_implementation=attention), STUDENT)
    got = [teacher(clips(seed))._asdict() for seed in SEEDS]
    assert teacher.layers == (1, 2) and teacher.width == got[0]["features"].shape[-1] == (12 if kind is Projected else 32)
    assert got[0]["features"].shape[:3] == (2, 2, 1 + 2 * 16) and got[0]["attention"].shape == (2, 2, 16)
    assert_rule(
        (x, own(kind, clips(s), torch.float64), own(kind, clips(s), torch.float32)) for s, x in zip(SEEDS, got, strict=True)
    )


def test_layers() -> None:
    named = ClipTeacher(clip(), STUDENT, [0, 2])
    whole = ClipTeacher(clip(), STUDENT, 3)
    assert named.layers == (0, 2) and whole.layers == (0, 1, 2)
    assert torch.equal(named(clips()).features, whole(clips()).features[[0, 2]])
    for wrong, message in [(4, "from 1 to 3, got 4"), ([3], "from 0 to 2, got 3"), ([2, 0], "ascending"), ([], "at least one")]:
        with pytest.raises(ValueError, match=message):
            ClipTeacher(clip(), STUDENT, wrong)


def test_clips_of_another_size_are_resized() -> None:
    """Frames of one colour are resized, so that the interpolation does not matter."""
    large = replace(STUDENT, img_size=48, patch_size=12)
    colours = [torch.randn(2, 3, 4, 1, 1, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    small, big = ([x.expand(-1, -1, -1, side, side) for x in colours] for side in (32, 48))
    got = [ClipTeacher(clip(), large)(x)._asdict() for x in big]
    assert_rule(
        (x, own(Projected, y, torch.float64), own(Projected, y, torch.float32)) for x, y in zip(got, small, strict=True)
    )


def test_errors_of_the_teacher() -> None:
    with pytest.raises(ValueError, match=r"grid of \(2, 2\) patches; allowed is \(4, 4\), .* images of 32 and patches of 8"):
        ClipTeacher(clip(), VideoMambaConfig(img_size=32, patch_size=16, depth=1))
    with pytest.raises(TypeError, match="CLIPVisionModelWithProjection, got Linear"):
        ClipTeacher(nn.Linear(2, 2), STUDENT)
    with pytest.raises(ValueError, match=r"clips must have shape \(B, C=3, T=4, H=32, W=32\), got \(2, 3, 4, 48, 48\)"):
        ClipTeacher(clip(), STUDENT)(clips(size=48))


@pytest.mark.parametrize("kind", [Projected, CLIPVisionModel, CLIPModel])
def test_from_a_folder(tmp_path: Path, kind: type) -> None:
    model = clip(kind if kind is CLIPVisionModel else Projected)
    if kind is CLIPModel:
        text = CLIPTextConfig(**SIZES, vocab_size=VOCABULARY, max_position_embeddings=8, projection_dim=12)
        whole = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=VISION, projection_dim=12))
        whole.vision_model.load_state_dict(model.vision_model.state_dict())
        whole.visual_projection.load_state_dict(model.visual_projection.state_dict())
        whole.save_pretrained(tmp_path)
    else:
        model.save_pretrained(tmp_path)
    teacher = ClipTeacher.from_pretrained(str(tmp_path), STUDENT, 1)
    assert teacher.width == (32 if kind is CLIPVisionModel else 12) and teacher.layers == (2,)
    got, wanted = teacher.model.state_dict(), model.state_dict()
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_a_folder_of_another_model(tmp_path: Path) -> None:
    BertModel(BertConfig(**SIZES, vocab_size=VOCABULARY)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds the model BertModel; allowed: CLIPModel"):
        ClipTeacher.from_pretrained(str(tmp_path), STUDENT)


def test_masked_alignment_with_clip() -> None:
    teacher, student = ClipTeacher(clip(), STUDENT), VideoMambaEncoder(STUDENT)
    seen = teacher(clips())
    mask = attention_mask(seen.attention, 0.75, torch.Generator().manual_seed(0))
    loss = alignment_loss(student(clips(), mask).clip, keep_visible(seen.features, mask))
    loss.backward()
    assert student.patch_embed.proj.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters()) and not teacher.model.training


def bert(pooling: bool = False, **other: Any) -> BertModel:
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 8}
    return BertModel(BertConfig(**sizes, **other), add_pooling_layer=pooling).eval()


def words(seed: int = 2) -> Tensor:
    return torch.randint(5, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(seed))


CROSS = {"is_decoder": True, "add_cross_attention": True}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_text_alone_is_an_encoder(attention: str) -> None:
    """Without a video, a BERT with cross-attention equals the same weights without it; padding changes nothing."""
    text = TextEncoder(bert(attn_implementation=attention, **CROSS), video_width=24)
    plain, exact = bert(attn_implementation="eager"), bert(attn_implementation="eager").double()
    for model in (plain, exact):
        model.load_state_dict({k: v for k, v in text.bert.state_dict().items() if k in model.state_dict()})
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[:, 4:] = True
    samples = []
    with torch.no_grad():
        for seed in SEEDS:
            whole, short = text(words(seed)), text(words(seed), padding)
            assert torch.equal(whole.pooled, whole.words[:, 0])
            truths, plains = (
                {"whole": model(words(seed)).last_hidden_state, "short": model(words(seed)[:, :4]).last_hidden_state}
                for model in (exact, plain)
            )
            samples.append(({"whole": whole.words, "short": short.words[:, :4]}, truths, plains))
    assert_rule(samples)


def test_pooler_where_there_is_one() -> None:
    model = bert(pooling=True)
    assert torch.equal(TextEncoder(model)(words()).pooled, model(words(), attention_mask=torch.zeros(4, 1, 6, 6)).pooler_output)


def test_every_word_sees_the_video_and_all_words() -> None:
    text = TextEncoder(bert(**CROSS), video_width=24)
    video = torch.randn(4, 7, 24, generator=torch.Generator().manual_seed(3))
    first = text(words(), video=video).words
    for other in ({"words": words().index_fill(1, torch.tensor([5]), 1), "video": video}, {"words": words(), "video": -video}):
        assert ((text(**other).words - first).abs().sum(-1) > 0).all()


def test_errors_of_the_text_encoder() -> None:
    for call, error, message in [
        (lambda: TextEncoder(nn.Linear(2, 2)), TypeError, "transformers BertModel, got Linear"),
        (lambda: TextEncoder(bert(), 24), ValueError, "is_decoder=True, add_cross_attention=True"),
        (lambda: TextEncoder(bert())(words(), video=torch.ones(4, 7, 24)), ValueError, "made without video_width"),
        (lambda: TextEncoder(bert(**CROSS), 24)(words(), video=torch.ones(4, 7, 25)), ValueError, r"\(B=4, V, D=24\)"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_three_losses_of_video_and_text() -> None:
    """The losses of contrast, matching and masked words have gradients for all parameters of both models."""
    torch.manual_seed(0)
    encoder = VideoMambaEncoder(VideoMambaConfig(img_size=16, patch_size=8, depth=2, embed_dim=24, num_frames=2))
    text = TextEncoder(bert(**CROSS), video_width=24)
    of_video, of_text, match, predict = nn.Linear(24, 8), nn.Linear(32, 8), nn.Linear(32, 2), nn.Linear(32, VOCABULARY)
    generator, sentences = torch.Generator().manual_seed(0), words()
    padding = torch.zeros_like(sentences, dtype=torch.bool)
    padding[0, 4:] = True
    seen = encoder(torch.randn(4, 3, 2, 16, 16))
    near = similarity(of_video(seen.pooled[:, 0]), of_text(text(sentences, padding).pooled))
    pairs = matching_pairs(near, generator=generator)
    joint = text(sentences[pairs.texts], padding[pairs.texts], seen.tokens[pairs.videos])
    shown, labels = mask_words(sentences, 4, VOCABULARY, padding, generator=generator)
    guessed = predict(text(shown, padding, seen.tokens).words)
    losses = contrastive_loss(near), matching_loss(match(joint.pooled)), masked_language_loss(guessed, labels)
    both = dict(nn.ModuleDict({"video": encoder, "text": text}).named_parameters())
    reached = set()
    for loss in losses:
        assert loss.isfinite()
        grads = torch.autograd.grad(loss, list(both.values()), retain_graph=True, allow_unused=True)
        of_this = {name for name, grad in zip(both, grads, strict=True) if grad is not None and grad.any()}
        assert {"video.patch_embed.proj.weight", "text.bert.embeddings.word_embeddings.weight"} <= of_this
        reached |= of_this
    assert {name.split(".")[1] for name in both.keys() - reached} == {"clip_decoder"}


def test_message_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"videomamba-bench\[teachers\]"):
        TextEncoder(None)
