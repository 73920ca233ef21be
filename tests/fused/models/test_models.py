"""Fused models are the reference's: same outputs, same gradients, same state_dict, same initial values."""

import copy
from unittest import mock

import pytest
import torch
from golden import fill, golden
from rule import assert_rule
from toy_models import TOY, assert_same, clip_of, mask_of, models, results

import fused
import reference
from fused.models.videomamba import embedding
from fused.modules import mamba as mixer

IMAGE = {"num_frames": None}
ORDERS = ("temporal", "alternating", "both")

CLASSIFIERS = {
    "plain": {},
    "deep": {"depth": 4},
    "tubelet-2": {"kernel_size": 2},
    "layernorm": {"rms_norm": False},
    "unfused": {"fused_add_norm": False},
    "unfused-layernorm": {"fused_add_norm": False, "rms_norm": False, "norm_epsilon": 1e-3},
    "residual-as-input": {"residual_in_fp32": False},
    "feature": {"num_classes": 0},
    "image": IMAGE,
    "image-distill": IMAGE | {"distill_dim": 12},
    "distill-temporal": {"distill_dim": 12, "scan_order": "temporal"},
    "rectangle": {"img_size": (32, 48)},
    "rest-of-a-patch": {"img_size": (40, 37), "channels": 2, "stride": 16},
    "overlap": {"stride": 8},
    "overlap-image": IMAGE | {"stride": 7, "img_size": (32, 40)},
    "gaps": {"stride": 20, "img_size": 40},
    "small-patch-tubelet": {"patch_size": 8, "img_size": 16, "kernel_size": 4, "stride": 4},
    "ssm": {"ssm_cfg": {"expand": 3, "d_state": 5, "d_conv": 3, "dt_rank": 7}},
    "ssm-bias": {"ssm_cfg": {"bias": True, "conv_bias": False, "expand": 1, "d_conv": 2}},
    "forward-only": {"bimamba": False, "readout": "last"},
    "forward-only-both": {"bimamba": False, "scan_order": "both", "readout": "mean"},
    "forward-only-temporal": {"bimamba": False, "scan_order": "temporal", "readout": "last"},
    "mean": {"readout": "mean"},
    "last-temporal": {"readout": "last", "scan_order": "temporal"},
    "tokens": {"readout": "tokens", "kernel_size": 2},
    "tokens-distill": {"readout": "tokens", "distill_dim": 12},
    "bias-both": {"ssm_cfg": {"bias": True}, "scan_order": "both"},
    **{order: {"scan_order": order, "depth": 3} for order in ORDERS},
}


@pytest.mark.parametrize("overrides", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_classifier(overrides):
    plain, fast = models("VideoMamba", overrides)
    clip = clip_of(plain.config)
    assert_same(results(fast, clip), results(plain, clip))


ENCODERS = {
    "plain": {},
    "no-pool-norm": {"add_pool_norm": False},
    "no-decoder": {"clip_return_layer": 0},
    "two-layers": {"depth": 3, "clip_return_layer": 2, "clip_norm_type": "none"},
    "layers-apart": {"depth": 4, "clip_return_layer": 2, "clip_student_return_interval": 2.5},
    "unfused": {"fused_add_norm": False, "clip_return_layer": 2},
    "layernorm": {"rms_norm": False},
    "overlap": {"stride": 8, "kernel_size": 2},
    "image": IMAGE | {"img_size": (32, 48)},
    **{order: {"scan_order": order, "depth": 3, "clip_return_layer": 2} for order in ORDERS},
}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("overrides", ENCODERS.values(), ids=ENCODERS)
def test_encoder(overrides, masked):
    plain, fast = models("VideoMambaEncoder", overrides)
    config = plain.config
    mask = mask_of(1 + config.patches * config.tubelets) if masked else None
    assert_same(results(fast, clip_of(config), mask=mask), results(plain, clip_of(config), mask=mask))


@pytest.mark.parametrize("kind", ["cls", "avg", "cls+avg", "cls_cat_avg", "last"])
def test_pooling(kind):
    plain, fast = models("VideoMambaEncoder", {"pool_type": kind, "depth": 1, "kernel_size": 2, "scan_order": "temporal"})
    mask = mask_of(9, tubelets=2)
    for how in ({}, {"keep_temporal": True}, {"mask": mask}, {"mask": mask, "keep_temporal": True}):
        wanted, got = plain(clip_of(plain.config), **how), fast(clip_of(plain.config), **how)
        assert_same({"pooled": got.pooled}, {"pooled": wanted.pooled})


@pytest.mark.parametrize("order", ["spatial", *ORDERS])
def test_image_through_a_video_model(order):
    plain, fast = models("VideoMambaEncoder", {"scan_order": order, "kernel_size": 2, "img_size": 64, "patch_size": 16})
    clip, mask = clip_of(plain.config, use_image=True), mask_of(17)
    for how in ({}, {"mask": mask}, {"keep_temporal": True}):
        assert_same(results(fast, clip, use_image=True, **how), results(plain, clip, use_image=True, **how))


def test_clip_features_alone_leave_the_same_parameters_without_gradient():
    grads = []
    for model in models("VideoMambaEncoder", {"depth": 3, "add_pool_norm": False}):
        clip = model(clip_of(model.config), mask_of(17)).clip
        (clip * fill(*clip.shape, phase=3)).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert {name for name, grad in grads[1].items() if grad is None} >= {"norm.weight", "layers.2.mixer.A_log"}
    assert_same(grads[1], grads[0])


@pytest.mark.parametrize("cut", [1, 5, 16])
def test_state_carries_a_causal_model_over_a_cut(cut):
    plain, fast = models("VideoMamba", {"bimamba": False, "readout": "last"})
    embedded = fast.embed(clip_of(plain.config))
    whole, whole_state, _ = fast.encode(embedded, return_state=True)
    first, state, _ = fast.encode(embedded[:, :cut], return_state=True)
    second, state, _ = fast.encode(embedded[:, cut:], state=state, return_state=True)
    wanted, wanted_state, _ = plain.encode(plain.embed(clip_of(plain.config)), return_state=True)
    pairs = zip((first, second, *sum(state, ())), (*wanted.split((cut, 17 - cut), 1), *sum(wanted_state, ())), strict=True)
    for i, (got, truth) in enumerate(pairs):
        assert_same({str(i): got}, {str(i): truth})
    assert_same({"": whole}, {"": wanted})
    loss = (second * fill(*second.shape, phase=3)).sum()
    truth = (whole[:, cut:] * fill(*second.shape, phase=3)).sum()
    names, parameters = zip(*fast.named_parameters(), strict=True)
    got, wanted = (torch.autograd.grad(x, parameters, allow_unused=True, retain_graph=True) for x in (loss, truth))
    assert_same(dict(zip(names, got, strict=True)), dict(zip(names, wanted, strict=True)))


@pytest.mark.parametrize("package", [reference, fused], ids=["reference", "fused"])
def test_temporal_order_of_one_patch_per_frame_is_the_spatial_one(package):
    clip, logits = None, []
    for order in ("spatial", *ORDERS[:2]):
        model = golden(package.VideoMamba(package.VideoMambaConfig(**TOY | {"img_size": 16, "scan_order": order})))
        clip = clip_of(model.config).float()
        logits.append(model(clip))
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_features_of_encode():
    plain, fast = models("VideoMamba", {"scan_order": "temporal", "depth": 3})
    outputs = []
    for model in (plain, fast):
        tokens = model.embed(clip_of(plain.config), mask_of(17))
        normed, state, features = model.encode(tokens, mask_of(17), out_layers=(0, 2))
        assert state is None
        outputs.append({"tokens": normed} | {f"feature {i}": x for i, x in enumerate(features)})
    assert_same(outputs[1], outputs[0])


def test_positions_of_the_decoder():
    for dim in (12, 7):
        got = embedding.sincos_positions(50, dim, torch.device("cpu"))
        assert torch.equal(got, reference.models.videomamba.embedding.sincos_positions(50, dim))


def test_hidden_pixels_are_not_read():
    _, model = models("VideoMambaEncoder", {})
    mask, clip = mask_of(17), clip_of(model.config)
    frames = mask[:, 1:].view(2, 1, 4, 2, 2).repeat_interleave(16, 3).repeat_interleave(16, 4)
    dirty = torch.where(frames, float("nan"), clip)
    wanted, got = results(copy.deepcopy(model), clip, mask=mask), results(model, dirty, mask=mask)
    assert_same(got, wanted)


@pytest.mark.parametrize("kind", ["VideoMamba", "VideoMambaEncoder"])
@pytest.mark.parametrize(
    "overrides", [{}, {"rms_norm": False, "bimamba": False, "readout": "mean", "pool_type": "avg"}, IMAGE | {"distill_dim": 9}]
)
def test_state_dict_layout(kind, overrides):
    plain, fast = (getattr(p, kind)(p.VideoMambaConfig(**TOY | overrides)) for p in (reference, fused))
    shapes = [{k: (v.shape, v.dtype) for k, v in m.state_dict().items()} for m in (plain, fast)]
    assert shapes[0] == shapes[1]
    assert {k for k, _ in plain.named_parameters()} == {k for k, _ in fast.named_parameters()}
    assert plain.no_weight_decay() == fast.no_weight_decay()


@pytest.mark.parametrize("kind", ["VideoMamba", "VideoMambaEncoder"])
def test_initial_values_have_the_same_distribution(kind):
    torch.manual_seed(0)
    plain, fast = (getattr(p, kind)(p.VideoMambaConfig(**TOY | {"embed_dim": 96})) for p in (reference, fused))
    for (name, wanted), got in zip(plain.named_parameters(), fast.parameters(), strict=True):
        wanted, got = wanted.detach(), got.detach()
        if wanted.std() == 0 or name.endswith("_log"):
            assert torch.equal(wanted, got), name
        elif wanted.numel() >= 1000:
            assert got.std() / wanted.std() == pytest.approx(1, abs=0.1), name
            assert got.abs().max() / wanted.abs().max() == pytest.approx(1, abs=0.25), name


@pytest.mark.parametrize("dt_init", ["random", "constant"])
def test_mixer_alone_starts_as_upstreams(dt_init):
    torch.manual_seed(0)
    own = {"dt_init": dt_init, "dt_min": 0.01, "dt_max": 0.2, "dt_scale": 0.5, "dt_init_floor": 0.02}
    plain, fast = (p.Mamba(128, **own) for p in (reference, fused))
    steps = [torch.nn.functional.softplus(m.dt_proj.bias.detach()) for m in (plain, fast)]
    for step in steps:
        assert step.min() == pytest.approx(0.02, rel=1e-4) and 0.15 < step.max() <= 0.2001
    assert steps[1].log().mean() == pytest.approx(steps[0].log().mean().item(), abs=0.2)
    reach = [m.dt_proj.weight.detach().abs().max().item() for m in (plain, fast)]
    assert reach[1] == pytest.approx(reach[0], rel=0.02)


def test_autocast_is_as_near_to_the_truth_as_the_reference():
    samples = []
    for seed in range(4):
        truth, _ = models("VideoMambaEncoder", {"num_frames": 2})
        with torch.no_grad():
            for p in truth.parameters():
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p)
        clip, row = clip_of(truth.config).float(), {"truth": truth(clip_of(truth.config))}
        for package in (reference, fused):
            model = package.VideoMambaEncoder(package.VideoMambaConfig(**TOY | {"num_frames": 2})).eval()
            model.load_state_dict(truth.state_dict())
            with torch.autocast("cpu", torch.bfloat16):
                assert model.embed(clip).dtype == torch.float32
                assert model.patch_embed(clip).dtype == torch.bfloat16
                row[package.__name__] = model(clip)
        got, plain, wanted = row["fused"], row["reference"], row["truth"]
        assert [x.dtype for x in got] == [x.dtype for x in plain]
        samples.append(tuple({n: getattr(x, n).detach() for n in got._fields} for x in (got, wanted, plain)))
    assert_rule(samples)


def test_checkpointing_gives_the_same_gradients():
    configs = [fused.VideoMambaConfig(**TOY, use_checkpoint=use, checkpoint_num=1) for use in (False, True)]
    grads = []
    for config, runs in zip(configs, (2, 3), strict=True):
        model = golden(fused.VideoMamba(config, backend="torch")).train()
        with mock.patch.object(mixer, "both_directions_eager", side_effect=mixer.both_directions_eager) as spy:
            torch.manual_seed(0)
            grads.append(results(model, clip_of(config).float()))
        assert spy.call_count == runs
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_drop_path_repeats_under_a_seed_and_draws_like_the_reference():
    plain, fast = (m.train() for m in models("VideoMamba", {"depth": 4, "drop_path_rate": 0.6}))
    clip = clip_of(plain.config)
    logits = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        logits.append(fast(clip))
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    torch.manual_seed(1)
    assert_same({"": logits[0]}, {"": plain(clip)})


def test_default_drop_path_rates():
    for package in (reference, fused):
        config = package.VideoMambaConfig(**TOY | {"depth": 5})
        model = package.VideoMamba(config)
        rates = [layer.drop_path.rate for layer in model.layers] + [model.drop_path.rate]
        assert rates == pytest.approx([0, 0, 0.025, 0.05, 0.075, 0.1])
        assert package.VideoMambaEncoder(config).drop_path.rate == 0
