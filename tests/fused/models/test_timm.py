"""VideoMamba under timm's conventions: its methods here, the registry itself where timm imports."""

import re
from unittest import mock

import pytest
import torch
from golden import fill, golden

import fused
from fused import VideoMamba, VideoMambaConfig
from fused.models.videomamba.timm_api import TokenFeatures
from fused.models.videomamba.timm_registry import videomamba_base, videomamba_tiny

TOY = {"img_size": 32, "depth": 3, "embed_dim": 32, "num_frames": 4, "num_classes": 5}
CLIP = fill(2, 3, 4, 32, 32, phase=7)


def toy(**overrides):
    return golden(VideoMamba(VideoMambaConfig(**TOY | overrides)))


def test_forward_in_two_parts():
    model = toy()
    tokens = model.forward_features(CLIP)
    assert tokens.shape == (2, 17, 32) and (model.num_classes, model.num_features, model.embed_dim) == (5, 32, 32)
    assert torch.equal(model.forward_head(tokens), model(CLIP))
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])


def test_another_head():
    model = toy().double().bfloat16()
    assert model.get_classifier() is model.head
    model.reset_classifier(9)
    assert model.head.weight.shape == (9, 32) and model.head.weight.dtype == torch.bfloat16 and model.num_classes == 9
    assert model.head.weight.requires_grad and not model.head.bias.any() and 0.01 < model.head.weight.std() < 0.03
    model = toy()
    model.reset_classifier(0, global_pool="token")
    assert torch.equal(model(CLIP), toy().forward_features(CLIP)[:, 0]) and "head.weight" not in model.state_dict()
    assert VideoMamba(model.config).load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="global_pool is 'avg'; allowed: 'token'"):
        model.reset_classifier(3, "avg")
    with pytest.raises(ValueError, match="num_classes is -1"):
        model.reset_classifier(-1)


@pytest.mark.parametrize("overrides", [{}, {"num_frames": None, "distill_dim": 9}], ids=["video", "image"])
def test_every_parameter_has_a_group(overrides):
    """Embeddings first, then layer by layer, the final norm with the last; heads are what no pattern matches."""
    model = toy(**overrides)
    names = [name for name, _ in model.named_parameters()]
    matcher = model.group_matcher()
    stem = [name for name in names if re.match(matcher["stem"], name)]
    (layers, _), (behind, last) = matcher["blocks"]
    found = {name: int(re.match(layers, name)[1]) for name in names if re.match(layers, name)}
    norm = [name for name in names if re.match(behind, name)]
    heads = [name for name in names if "head" in name.partition(".")[0]]
    assert sorted([*stem, *found, *norm, *heads]) == sorted(names) and (norm, last) == (["norm_f.weight"], (99999,))
    assert all(layer == int(name.split(".")[1]) for name, layer in found.items()) and set(found.values()) == {0, 1, 2}
    assert re.compile(matcher["stem"]).groups == re.compile(behind).groups == 0  # what is captured would be a number
    assert model.no_weight_decay() <= set(stem)
    assert all(re.match(model.group_matcher(coarse=True)["blocks"], name) for name in found)


def test_gradient_checkpointing_can_be_switched():
    model, grads = toy().train(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert [layer.recompute for layer in model.layers] == [enable] * 3 and model.config.use_checkpoint == enable
        model.zero_grad()
        torch.manual_seed(0)
        model(CLIP).square().sum().backward()
        grads.append(model.pos_embed.grad.clone())
    assert torch.equal(*grads)


def test_token_features():
    """The last layer's are the tokens that the head reads; one before, those of the model without what is behind it."""
    model = toy()
    shorter = VideoMamba(VideoMambaConfig(**TOY | {"depth": 2})).eval()
    shorter.load_state_dict(model.state_dict(), strict=False)
    features = TokenFeatures(model, (-1, 1, 1))
    last, middle, again = features(CLIP)
    assert torch.equal(last, model.forward_features(CLIP)) and torch.equal(middle, again)
    assert torch.equal(middle, shorter.forward_features(CLIP))
    for wrong in ((3,), (-4,), ()):
        with pytest.raises(ValueError, match=re.escape(f"out_indices is {wrong!r}; allowed: layers from -3 to 2")):
            TokenFeatures(model, wrong)


SMALL = {"depth": 1, "img_size": 32}


def test_what_the_registry_builds(monkeypatch):
    model = videomamba_tiny(num_classes=7, in_chans=1, **SMALL)
    assert model(torch.zeros(1, 1, 8, 32, 32)).shape == (1, 7) and model.default_cfg["input_size"] == (1, 32, 32)
    features = videomamba_tiny(features_only=True, out_indices=(0,), num_frames=None, **SMALL)
    assert [x.shape for x in features(torch.zeros(1, 3, 32, 32))] == [(1, 5, 192)]
    assert videomamba_tiny(pretrained_cfg="ssv2_f16_res224to288", depth=1).config == VideoMambaConfig.tiny(
        depth=1, num_classes=174, num_frames=16, img_size=288
    )
    with mock.patch.object(VideoMamba, "from_pretrained", return_value=toy()) as load:
        videomamba_tiny(pretrained=True, num_classes=3)
        videomamba_tiny(pretrained=True, num_frames=None)
        videomamba_base(pretrained=True, cache_dir="/c")
        videomamba_tiny(pretrained=True, pretrained_cfg="coin_f64_res224", backend="torch")
    common = {"backend": "auto", "cache_dir": None}
    assert [(call.args[0], call.kwargs) for call in load.call_args_list] == [
        ("videomamba_t16_k400_f8_res224", common | {"num_classes": 3, "num_frames": 8}),
        ("videomamba_t16_in1k_res224", common | {"num_frames": None}),
        ("videomamba_b16_in1k_res224", common | {"cache_dir": "/c", "num_frames": 8}),
        ("videomamba_t16_coin_f64_res224", common | {"backend": "torch"}),
    ]
    with pytest.raises(ValueError, match="no published weights 'k400_f9' of this size; allowed: in1k_res224, "):
        videomamba_tiny(pretrained_cfg="k400_f9")
    with pytest.raises(ValueError, match="name published ones by a tag"):
        videomamba_tiny(pretrained_cfg={"url": "x"})


def test_timms_own_registry():
    try:
        import timm
        from timm.optim import param_groups_layer_decay
    except Exception as error:  # beside a torchvision for another PyTorch it raises what it likes
        with pytest.raises(ImportError, match=r"timm cannot be imported.*'videomamba-bench\[timm\]'"):
            fused.register_timm()
        pytest.skip(f"timm does not import here ({type(error).__name__}: {error}): register_timm was only seen to say so")
    for _ in range(2):
        fused.register_timm()
    assert timm.list_models("videomamba_*") == [f"videomamba_{size}" for size in ("base", "middle", "small", "tiny")]
    model = timm.create_model("videomamba_tiny", num_classes=7, **SMALL | {"depth": 2})
    assert isinstance(model, VideoMamba) and model.get_classifier().weight.shape == (7, 192)
    tagged = timm.create_model("videomamba_small.k400_f16_res224", depth=1)
    assert (tagged.config.num_frames, tagged.num_classes) == (16, 400)
    (tokens,) = timm.create_model("videomamba_tiny", features_only=True, **SMALL)(torch.zeros(1, 3, 8, 32, 32))
    assert tokens.shape == (1, 33, 192)
    groups = param_groups_layer_decay(model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    order = ("pos_embed", "layers.0.mixer.in_proj.weight", "layers.1.mixer.in_proj.weight", "head.weight")
    assert [scales[id(named[name])] for name in order] == [0.125, 0.25, 0.5, 1.0]
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(model.pos_embed)] == 0 and decays[id(model.layers[0].mixer.A_log)] == 0.1
