"""Vamba in both packages: padding, packing, caches, text without a video, losses, and what it refuses."""

import importlib
from dataclasses import replace

import pytest
import torch
from golden import golden

SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "mrope_section": (1, 1, 1), "mixer": {"headdim": 8, "d_state": 4},
}  # fmt: skip


def model(package, **options):
    return golden(package.Vamba(package.VambaConfig(**SIZES | options))).double()


def ids(*lengths, seed=0):
    rows = [torch.randint(1, 31, (n,), generator=torch.Generator().manual_seed(seed + i)) for i, n in enumerate(lengths)]
    return torch.stack(rows) if len(set(lengths)) == 1 else rows


def video(tokens, rows=1, seed=0):
    return torch.randn(rows, tokens, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positions(*lengths):
    return torch.cat([torch.arange(n) for n in lengths]).expand(3, 1, -1)


def padded(parts, left):
    """Return rows of equal length, and which of their tokens are no padding."""
    most = max(len(p) for p in parts)
    fill = [torch.full((most - len(p), *p.shape[1:]), 3).to(p.dtype) for p in parts]
    rows = torch.stack([torch.cat((f, p) if left else (p, f)) for p, f in zip(parts, fill, strict=True)])
    ones = [torch.ones(len(p), dtype=torch.long) for p in parts]
    zeros = [torch.zeros(len(f), dtype=torch.long) for f in fill]
    return rows, torch.stack([torch.cat((z, o) if left else (o, z)) for o, z in zip(ones, zeros, strict=True)])


def gradients(net, loss, *inputs):
    return torch.autograd.grad(loss, [*net.parameters(), *inputs], allow_unused=True)


def assert_same(got, due):
    for a, b in zip(got, due, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_a_padded_batch_equals_each_row_alone(package, left):
    net, videos = model(package), [video(n, seed=n)[0] for n in (9, 0, 5)]
    texts = ids(4, 7, 2)
    tokens, mask = padded(texts, left)
    clips, _ = padded(videos, left=False)
    clips.requires_grad_()
    logits = net(tokens, video=clips, attention_mask=mask, encoder_seq_lens=torch.tensor([[9], [0], [5]])).logits
    alone = [net(t[None], video=clips[i : i + 1, : len(videos[i])]).logits[0] for i, t in enumerate(texts)]
    kept = logits[mask.bool()]
    torch.testing.assert_close(kept, torch.cat(alone))
    losses = kept.square().sum(), torch.cat(alone).square().sum()
    assert_same(*(gradients(net, loss, clips) for loss in losses))


@pytest.mark.parametrize("masked", [False, True], ids=["positions", "mask"])
def test_packed_samples_equal_each_alone(package, masked):
    """Also one without a video, whose length is 0, and padding behind the last."""
    net, tokens, clip = model(package), ids(12), video(14).requires_grad_()
    lengths, texts = [6, 0, 5], [4, 3, 4]
    options = {}
    if masked:
        blocks = torch.block_diag(*(torch.ones(n, n, dtype=torch.long) for n in (*texts, 1))).tril()
        options["attention_mask"] = blocks[None, None]
    logits = net(tokens, video=clip, position_ids=positions(*texts, 1), encoder_seq_lens=[[*lengths, 3]], **options).logits
    places, ends = torch.tensor([0, 4, 7, 11]), torch.tensor([0, 6, 6, 11])
    alone = [
        net(tokens[:, p : p + n], video=clip[:, e : e + m]).logits
        for p, n, e, m in zip(places, texts, ends, lengths, strict=False)
    ]
    torch.testing.assert_close(logits[:, :11], torch.cat(alone, 1))
    losses = logits[:, :11].square().sum(), torch.cat(alone, 1).square().sum()
    assert_same(*(gradients(net, loss, clip) for loss in losses))


def test_conversations_about_one_video_read_all_of_it(package):
    net, tokens, clip = model(package), ids(9), video(7)
    logits = net(tokens, video=clip, position_ids=positions(4, 5), encoder_seq_lens=[[7]]).logits
    alone = [net(part, video=clip).logits for part in tokens.split((4, 5), 1)]
    torch.testing.assert_close(logits, torch.cat(alone, 1))
    torch.testing.assert_close(net(tokens, video=clip, position_ids=positions(4, 5)).logits, logits)


def test_a_mask_of_pairs_holds_beside_the_lengths(package):
    net, tokens, clip = model(package), ids(5), video(8)
    allowed = torch.rand(1, 5, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    allowed[0, 2] = False  # a token that reads nothing
    logits = net(tokens, video=clip, cross_attention_mask=allowed).logits
    assert logits.isfinite().all()
    both = net(tokens, video=clip, cross_attention_mask=allowed, encoder_seq_lens=[[6]]).logits
    narrowed = allowed & (torch.arange(8) < 6)
    torch.testing.assert_close(both, net(tokens, video=clip, cross_attention_mask=narrowed).logits)
    assert not torch.equal(both, logits)


def test_tokens_that_read_nothing_of_a_video_do_not_change_with_it(package):
    net, tokens, clip = model(package), ids(5), video(8)
    allowed = torch.ones(1, 5, 8, dtype=torch.bool)
    allowed[0, :2] = False
    logits, other = (net(tokens, video=v, cross_attention_mask=allowed).logits for v in (clip, clip + 1))
    assert torch.equal(logits[:, :2], other[:, :2]) and (logits[:, 2:] != other[:, 2:]).any()
    found = gradients(net, logits.square().sum())
    assert all(g is None or g.isfinite().all() for g in found)


def test_padding_within_a_packed_sample_is_read_by_none(package):
    net, tokens, clip = model(package), ids(8), video(7)
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[0, 1] = 0
    logits = net(tokens, video=clip, position_ids=positions(4, 4), attention_mask=mask).logits
    first = net(tokens[:, [0, 2, 3]], video=clip, position_ids=torch.tensor([0, 2, 3]).expand(3, 1, -1)).logits
    torch.testing.assert_close(logits[:, [0, 2, 3]], first)
    torch.testing.assert_close(logits[:, 4:], net(tokens[:, 4:], video=clip).logits)


def test_padding_of_a_text_that_goes_on_has_the_references_position():
    found, tokens, mask = [], ids(6), torch.ones(1, 6, dtype=torch.long)
    mask[0, 4] = 0
    for name in ("reference", "fused"):
        net = model(importlib.import_module(name))
        cache = net(tokens[:, :4], use_cache=True).cache
        found.append(net(tokens[:, 4:], cache=cache, attention_mask=mask).logits)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("has_video", [True, False])
def test_a_cache_continues_as_the_whole(package, rotated, has_video):
    net, tokens = model(package, cross_attn_use_position_embeddings=rotated), ids(9, 9)
    options = {}
    if has_video:
        options = {"video": video(6, 2), "encoder_seq_lens": [[6], [4]]}
        if rotated:
            options["encoder_position_ids"] = torch.arange(6).expand(3, 2, -1)
    valid = torch.ones(2, 9, dtype=torch.long)
    valid[1, :2] = 0
    whole = net(tokens, attention_mask=valid, **options).logits
    out = net(tokens[:, :4], attention_mask=valid[:, :4], use_cache=True, **options)
    found, first = [out.logits], out.cache
    for stop, start in ((7, 4), (8, 7), (9, 8)):
        out = net(tokens[:, start:stop], cache=out.cache, use_cache=True)
        found.append(out.logits)
    got = torch.cat(found, 1)
    torch.testing.assert_close(got[valid.bool()], whole[valid.bool()])
    again = net(tokens[:, 4:7], cache=first).logits  # no call wrote into it
    assert torch.equal(again, found[1])
    masked = net(tokens[:, 4:7], cache=replace(first, valid=None), attention_mask=valid[:, :7]).logits
    torch.testing.assert_close(masked, again)


def test_early_text_sees_all_of_the_video_and_no_later_text(package):
    net, tokens, clip = model(package), ids(6), video(9)
    logits = net(tokens, video=clip).logits
    torch.testing.assert_close(net(tokens[:, :3], video=clip).logits, logits[:, :3])
    changed = clip.clone()
    changed[:, -1] += 1
    assert (net(tokens, video=changed).logits[:, 0] != logits[:, 0]).any()


def test_the_last_mixer_has_no_effect_and_no_gradient(package):
    net, tokens, clip = model(package), ids(6), video(9)
    before = net(tokens, video=clip).logits
    last = net.model.layers[-1].vision_mixer
    with torch.no_grad():
        for p in last.parameters():
            p.fill_(torch.nan)
    out = net(tokens, video=clip, labels=tokens)
    assert torch.equal(out.logits, before)
    out.loss.backward()
    assert all(p.grad is None for p in last.parameters())


@pytest.mark.parametrize(("value", "clamped"), [(1.7, 1.0), (-0.2, 0.0)])
def test_alpha_is_clamped_and_keeps_its_gradient(package, value, clamped):
    net, tokens, clip = model(package).train(), ids(6), video(9)
    alpha = net.model.layers[1].alpha
    with torch.no_grad():
        alpha.fill_(value)
    losses = [net(tokens, video=clip, labels=tokens).loss for _ in range(2)]  # a second forward before the first backward
    assert alpha.item() == clamped
    sum(losses).backward()
    assert alpha.grad.item() != 0


def test_alpha_is_clamped_in_inference(package):
    net, tokens, clip = model(package), ids(6), video(9)
    found = []
    for value in (1.0, 1.7):
        with torch.no_grad():
            net.model.layers[1].alpha.fill_(value)
            found.append(net(tokens, video=clip).logits)
    assert torch.equal(*found)


def test_alpha_weighs_the_same_in_inference_as_in_training(package):
    net, tokens, clip = model(package), ids(6), video(9)
    with torch.no_grad():
        net.model.layers[1].alpha.fill_(0.3)
        found = net(tokens, video=clip).logits
    torch.testing.assert_close(found, net(tokens, video=clip).logits.detach())


def test_embeddings_stand_for_tokens(package):
    net, tokens, clip = model(package), ids(6), video(9)
    logits = net(tokens, video=clip).logits
    assert torch.equal(net(inputs_embeds=net.model.embed_tokens(tokens), video=clip).logits, logits)


def test_only_labelled_tokens_are_learnt(package):
    net, tokens, clip = model(package), ids(6), video(9)
    labels = tokens.clone()
    labels[0, :3] = -100
    out = net(tokens, video=clip, labels=labels)
    due = torch.nn.functional.cross_entropy(out.logits[0, 2:-1], tokens[0, 3:])
    torch.testing.assert_close(out.loss, due)


@pytest.mark.parametrize("shift", [False, True])
def test_distillation(package, shift):
    """Row 0 has two labelled tokens, row 1 one, row 2 none."""
    loss = importlib.import_module(f"{package.__name__}.models.vamba.loss").distillation_loss
    random = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(3, 5, n, generator=random, dtype=torch.float64) for n in (11, 4))
    logits.requires_grad_()
    tokens = torch.stack([torch.randperm(11, generator=random)[:4] for _ in range(15)]).view(3, 5, 4)
    labels = torch.tensor([[-100, 1, 2, -100, -100], [-100, -100, -100, -100, 4], [-100] * 5])
    rows = []
    for row, places in ((0, (1, 2)), (1, (4,))):
        parts = []
        for place in (p - shift for p in places):
            p, q = (x.log_softmax(-1) for x in (teacher[row, place], logits[row, place][tokens[row, place]]))
            parts.append((p.exp() * (p - q)).sum())
        rows.append(sum(parts) / len(parts))
    due = sum(rows) / 2
    got = loss(logits, labels, teacher, tokens, shift=shift)
    torch.testing.assert_close(got, due)
    assert_same(torch.autograd.grad(got, [logits]), torch.autograd.grad(due, [logits]))


TOKENS = torch.arange(5)[None]
REFUSED = {
    "neither": (ValueError, "neither", {}),
    "both": (ValueError, "both", {"input_ids": TOKENS, "inputs_embeds": torch.zeros(1, 5, 16).double()}),
    "float ids": (TypeError, "input_ids", {"input_ids": TOKENS.float()}),
    "flat ids": (ValueError, "input_ids", {"input_ids": TOKENS[0]}),
    "embeddings": (ValueError, "inputs_embeds", {"inputs_embeds": torch.zeros(1, 5, 15).double()}),
    "width": (ValueError, "video has shape", {"input_ids": TOKENS, "video": video(4)[..., :9]}),
    "rows": (ValueError, "video has shape", {"input_ids": TOKENS, "video": video(4, 2)}),
    "positions": (ValueError, "position_ids", {"input_ids": TOKENS, "position_ids": TOKENS}),
    "video positions": (
        ValueError, "encoder_position_ids",
        {"input_ids": TOKENS, "video": video(4), "encoder_position_ids": torch.zeros(3, 1, 5).long()},
    ),
    "labels": (ValueError, "labels", {"input_ids": TOKENS, "labels": TOKENS[:, 1:]}),
    "float mask": (TypeError, "attention_mask", {"input_ids": TOKENS, "attention_mask": torch.zeros(1, 1, 5, 5)}),
    "mask": (ValueError, "attention_mask", {"input_ids": TOKENS, "attention_mask": torch.ones(1, 4).long()}),
    "cross mask": (
        ValueError, "cross_attention_mask",
        {"input_ids": TOKENS, "video": video(4), "cross_attention_mask": torch.ones(1, 4, 4).bool()},
    ),
    "cross mask's dtype": (
        TypeError, "cross_attention_mask", {"input_ids": TOKENS, "video": video(4), "cross_attention_mask": torch.ones(1, 5, 4)}
    ),
    "lengths without a video": (ValueError, "encoder_seq_lens", {"input_ids": TOKENS, "encoder_seq_lens": [[3]]}),
    "lengths": (ValueError, r"encoder_seq_lens\[0\]", {"input_ids": TOKENS, "video": video(4), "encoder_seq_lens": [[3, 2]]}),
    "rows of lengths": (ValueError, "2 rows", {"input_ids": TOKENS, "video": video(4), "encoder_seq_lens": [[3], [1]]}),
    "lengths' type": (TypeError, "encoder_seq_lens", {"input_ids": TOKENS, "video": video(4), "encoder_seq_lens": 4}),
    "negative": (ValueError, "encoder_seq_lens", {"input_ids": TOKENS, "video": video(4), "encoder_seq_lens": [[-1]]}),
    "float lengths": (
        TypeError, "encoder_seq_lens", {"input_ids": TOKENS, "video": video(4), "encoder_seq_lens": torch.ones(1, 1)}
    ),
    "samples": (
        ValueError, "2 videos in row 0.* 1 samples", {"input_ids": TOKENS, "video": video(4), "encoder_seq_lens": [[2, 2]]}
    ),
    "packed cache": (
        ValueError, "several", {"input_ids": TOKENS, "video": video(4), "position_ids": positions(2, 3), "use_cache": True}
    ),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(package, case):
    error, words, given = REFUSED[case]
    with pytest.raises(error, match=words):
        model(package)(**given)


def test_a_cache_that_does_not_fit_is_refused(package):
    net = model(package)
    cache = net(TOKENS, video=video(4), use_cache=True).cache
    with pytest.raises(ValueError, match="video is given"):
        net(TOKENS, video=video(4), cache=cache)
    with pytest.raises(ValueError, match="rows"):
        net(TOKENS.repeat(2, 1), cache=cache)
    with pytest.raises(ValueError, match="layers"):
        model(package, num_hidden_layers=2)(TOKENS, cache=cache)
    with pytest.raises(ValueError, match="shape"):
        model(package, num_key_value_heads=1)(TOKENS, cache=cache)
    with pytest.raises(ValueError, match="empty"):
        net(TOKENS, cache=package.VambaCache())
    with pytest.raises(ValueError, match="encoder_position_ids"):
        model(package, cross_attn_use_position_embeddings=True)(TOKENS, video=video(4))


FIELDS = {
    "vocab_size": 0, "hidden_size": 15, "num_key_value_heads": 3, "head_dim": 5, "rms_norm_eps": 0, "rope_theta": "1e6",
    "mrope_section": (1, 2), "use_alpha_balancing": "yes", "mixer": {"d_states": 4},
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", FIELDS)
def test_wrong_fields_are_refused(package, name):
    options = SIZES | {name: FIELDS[name]} | ({"head_dim": None} if name == "hidden_size" else {})
    with pytest.raises(ValueError, match=name):
        package.VambaConfig(**options)


def test_published_sizes(package):
    with torch.device("meta"):
        net = package.Vamba(package.VambaConfig.qwen2_vl_7b(num_hidden_layers=2))
    shapes = {name: tuple(t.shape) for name, t in net.state_dict().items()}
    layer = {name: shape for name, shape in shapes.items() if name.startswith("model.layers.1.")}
    added = [n for n in layer if "cross_attn" in n or "vision_mixer" in n]
    assert sum(torch.Size(layer[n]).numel() for n in added) == 29_364_736 + 78_437_456
    assert shapes["model.layers.1.vision_mixer.mixer.in_proj.weight"] == (14704, 3584)
    assert len(layer) == 7 * 2 + 3 + 2 + 1 + 1 + 8 and len(shapes) == 3 + 2 * len(layer)
