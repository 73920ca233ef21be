"""The configuration of both packages: derived values, sizes, what is refused and how, and models from a namespace or file."""

import dataclasses
import importlib
import logging
from types import SimpleNamespace

import pytest
import torch

import fused

TOY = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_frames": 4, "clip_output_dim": 12}


pytestmark = pytest.mark.usefixtures("unchecked")


def test_fields_and_defaults_are_the_same_in_both():
    fields = [
        [(f.name, f.default) for f in dataclasses.fields(importlib.import_module(name).VideoMambaConfig)]
        for name in ("reference", "fused")
    ]
    assert fields[0] == fields[1] and len(fields[0]) == 32


# field, wrong value, what the message must say is allowed; other fields that make it wrong
WRONG = [
    ("img_size", 8, "patch_size (16)", {}),
    ("img_size", (32, 8), "patch_size (16)", {}),
    ("img_size", 225, "multiples of patch_size (16)", {}),
    ("img_size", 30, "multiples of patch_size (16)", {}),
    ("img_size", (32, 40), "multiples of patch_size (16)", {}),
    ("img_size", (225, 224), "multiples of patch_size (16)", {}),
    ("img_size", 224, "multiples of patch_size (15)", {"patch_size": 15}),
    ("img_size", (32, 32, 32), "(height, width)", {}),
    ("img_size", 32.0, "pixels", {}),
    ("patch_size", 0, "positive integer", {}),
    ("stride", 0, "positive integer or None|positive integer, or None", {}),
    ("depth", 0, "positive integer", {}),
    ("depth", True, "positive integer", {}),
    ("embed_dim", -1, "positive integer", {}),
    ("channels", 1.5, "positive integer", {}),
    ("num_classes", -1, "from 0 up", {}),
    ("kernel_size", 0, "positive integer", {}),
    ("num_frames", 0, "None", {}),
    ("num_frames", 5, "multiple of kernel_size (2)", {"kernel_size": 2}),
    ("drop_rate", 1.0, "from 0 up to, not including, 1", {}),
    ("drop_path_rate", -0.1, "from 0 up to, not including, 1", {}),
    ("fc_drop_rate", float("nan"), "from 0 up to, not including, 1", {}),
    ("ssm_cfg", ["d_state"], "mapping", {}),
    ("ssm_cfg", {"d_stat": 4}, "d_state", {}),
    ("ssm_cfg", {"bimamba": False}, "d_state", {}),
    ("norm_epsilon", 0, "positive number", {}),
    ("norm_epsilon", float("inf"), "positive number", {}),
    ("checkpoint_num", -1, "from 0 up", {}),
    ("pool_type", "max", "'cls', 'avg', 'cls+avg', 'cls_cat_avg', 'last'", {}),
    ("readout", "avg", "'cls', 'mean', 'last', 'tokens'", {}),
    ("clip_decoder_embed_dim", 768, "embed_dim (192)", {}),
    ("clip_output_dim", 0, "positive integer", {}),
    ("clip_norm_type", None, "'l2', 'none'", {}),
    ("clip_return_layer", -1, "from 0 up", {}),
    ("clip_return_layer", 3, "depth (2)", {"depth": 2}),
    ("clip_return_layer", 2, "clip_student_return_interval", {"clip_student_return_interval": 0.25}),
    ("clip_student_return_interval", 0, "positive number", {}),
    ("clip_student_return_interval", float("inf"), "positive number", {}),
    ("distill_dim", 0, "None", {}),
    ("ckpt_num_frame", 0, "None", {}),
    ("ckpt_num_frame", -2, "None", {}),
    ("scan_order", "zigzag", "'spatial', 'temporal', 'alternating', 'both'", {}),
]


@pytest.mark.parametrize(("name", "value", "allowed", "others"), WRONG, ids=[f"{w[0]}-{w[1]}" for w in WRONG])
def test_a_wrong_value_is_named_with_what_is_allowed(package, name, value, allowed, others):
    with pytest.raises((ValueError, TypeError)) as raised:
        package.VideoMambaConfig(**others | {name: value})
    message = str(raised.value)
    shown = sorted(value) if isinstance(value, dict) else value
    assert message.startswith(name) and str(shown).strip("[]") in message, message
    assert any(words in message for words in allowed.split("|")), message


@pytest.mark.parametrize(
    ("name", "value"),
    [("drop_rate", "0.1"), ("drop_rate", None), ("norm_epsilon", None), ("clip_student_return_interval", "1"),
     ("rms_norm", "False"), ("bimamba", None), ("img_size", "224")],
)  # fmt: skip
def test_a_wrong_type_is_named_too(package, name, value):
    with pytest.raises((ValueError, TypeError), match=f"^{name} is {value!r}; allowed: "):
        package.VideoMambaConfig(**{name: value})


def test_an_unknown_field_is_refused(package):
    with pytest.raises(TypeError, match="embed_dims"):
        package.VideoMambaConfig(embed_dims=192)
    with pytest.raises(TypeError, match="num_class"):
        package.VideoMambaConfig.tiny(num_class=3)


@pytest.mark.parametrize("make", ["__call__", "tiny", "small", "middle", "base", "replace", "from_pretrained"])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("num_class", "the nearest is num_classes"), ("image_size", "the nearest is img_size"),
        ("frames", "the nearest is num_frames"), ("embedding_dim", "the nearest is embed_dim"),
        ("zzz", "the fields are img_size, patch_size, "),
    ],
)  # fmt: skip
def test_fused_names_the_nearest_field(make, wrong, says, tmp_path):
    Config = fused.VideoMambaConfig
    fused.VideoMamba(Config(**TOY)).save_pretrained(tmp_path)
    calls = {
        "__call__": Config,
        "replace": lambda **given: dataclasses.replace(Config(), **given),
        "from_pretrained": lambda **given: fused.VideoMamba.from_pretrained(tmp_path, **given),
    }
    with pytest.raises(TypeError, match=f"^{wrong} is no field of VideoMambaConfig; {says}"):
        (calls.get(make) or getattr(Config, make))(**{wrong: 3})


@pytest.mark.parametrize("kind", ["VideoMamba", "VideoMambaEncoder"])
@pytest.mark.parametrize("wrong", [224, "videomamba_t16_in1k_res224", None, {"embed_dim": 192}])
def test_fused_names_what_is_no_configuration(kind, wrong):
    with pytest.raises(TypeError, match=f"^config is a {type(wrong).__name__}; allowed: a VideoMambaConfig, such as"):
        getattr(fused, kind)(wrong)


def test_frozen_equal_and_hashable(package):
    config = package.VideoMambaConfig(ssm_cfg={"d_state": 8}, img_size=(32, 48))
    assert config == package.VideoMambaConfig(ssm_cfg={"d_state": 8}, img_size=(32, 48)) and len({config, config}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 3


def test_lists_and_mappings_of_the_caller_are_copied(package):
    given = {"d_state": 8}
    config = package.VideoMambaConfig(ssm_cfg=given, img_size=[32, 48])
    given["d_state"] = 4
    assert config.ssm_cfg == {"d_state": 8} and hash(config) == hash(dataclasses.replace(config))


def test_upstreams_minus_one_is_no_ckpt_num_frame(package):
    assert package.VideoMambaConfig(ckpt_num_frame=-1) == package.VideoMambaConfig()


SIZES = [("tiny", 192, 24), ("small", 384, 24), ("middle", 576, 32), ("base", 768, 24)]


@pytest.mark.parametrize(("size", "width", "depth"), SIZES)
def test_sizes(package, size, width, depth):
    make = getattr(package.VideoMambaConfig, size)
    assert (make().embed_dim, make().depth) == (width, depth)
    assert make(depth=3, num_frames=None) == package.VideoMambaConfig(embed_dim=width, depth=3, num_frames=None)


@pytest.mark.parametrize(
    ("given", "grid", "tubelets"),
    [
        ({}, (14, 14), 8),
        ({"num_frames": None}, (14, 14), 1),
        ({"img_size": (100, 64), "kernel_size": 4, "stride": 16}, (6, 4), 2),
        ({"img_size": 32, "stride": 8}, (3, 3), 8),
        ({"img_size": 64, "stride": 20}, (3, 3), 8),
    ],
)
def test_grid_and_tubelets(package, given, grid, tubelets):
    config = package.VideoMambaConfig(**given)
    assert (config.grid, config.patches, config.tubelets) == (grid, grid[0] * grid[1], tubelets)


@pytest.mark.parametrize(
    ("depth", "count", "interval", "layers"),
    [(24, 1, 1, (23,)), (24, 0, 1, ()), (32, 3, 2, (27, 29, 31)), (4, 2, 2.5, (1, 3)), (2, 2, 1, (0, 1))],
)
def test_student_layers(package, depth, count, interval, layers):
    config = package.VideoMambaConfig(depth=depth, clip_return_layer=count, clip_student_return_interval=interval)
    assert config.student_layers() == layers


def test_derived_values(package):
    config = package.VideoMambaConfig(**TOY)
    assert config.clip_decoder_embed_dim is config.drop_path_rate is config.stride is None
    model = package.VideoMambaEncoder(config)
    assert model.clip_decoder[0].head.weight.shape == (12, 32) and model.drop_path.rate == 0
    assert package.VideoMamba(config).drop_path.rate == 0.1
    config = dataclasses.replace(config, drop_path_rate=0.3, clip_decoder_embed_dim=32)
    assert package.VideoMamba(config).drop_path.rate == package.VideoMambaEncoder(config).drop_path.rate == 0.3


BACKBONE = {
    "img_size": 32, "patch_size": 16, "depth": 3, "embed_dim": 32, "channels": 2, "drop_path_rate": 0.25,
    "ssm_cfg": {"d_state": 8}, "norm_epsilon": 1e-6, "fused_add_norm": False, "rms_norm": False, "residual_in_fp32": False,
    "bimamba": False, "pool_type": "last", "kernel_size": 2, "num_frames": 4, "use_checkpoint": True,
    "checkpoint_num": 1, "clip_decoder_embed_dim": 32, "clip_output_dim": 12, "clip_return_layer": 2,
    "clip_student_return_interval": 2, "pretrained": None,
}  # fmt: skip


def test_builder_takes_every_field_of_the_backbone(package, caplog):
    model = package.build_videomamba(SimpleNamespace(vision_encoder=SimpleNamespace(**BACKBONE)))
    assert isinstance(model, package.VideoMambaEncoder) and not caplog.records
    assert model.config == package.VideoMambaConfig(**BACKBONE, clip_norm_type="none")
    out = model(torch.randn(2, 2, 4, 32, 32))
    assert out.pooled.shape == (2, 1, 32) and out.clip.shape == (2, 2, 9, 12)


def test_builder_needs_no_field(package):
    with torch.device("meta"):
        model = package.build_videomamba(SimpleNamespace(vision_encoder=SimpleNamespace()))
    assert model.config == package.VideoMambaConfig(clip_norm_type="none")


@pytest.mark.parametrize("name", sorted(BACKBONE))
def test_builder_does_without_any_one_field(package, name):
    rest = {k: v for k, v in BACKBONE.items() if k != name}
    with torch.device("meta"):
        # the decoder's width says 32, the default width is 192; CLS, which the default pools too, is blind in a causal model
        if name in ("embed_dim", "pool_type"):
            with pytest.raises(ValueError, match={"embed_dim": "clip_decoder_embed_dim"}.get(name, name)):
                package.build_videomamba(SimpleNamespace(vision_encoder=SimpleNamespace(**rest)))
        else:
            model = package.build_videomamba(SimpleNamespace(vision_encoder=SimpleNamespace(**rest)))
            assert model.config == package.VideoMambaConfig(**rest, clip_norm_type="none")


def test_builder_names_the_fields_that_it_ignores(package, caplog):
    section = SimpleNamespace(**TOY, name="videomamba_middle", clip_norm_type="l2")
    with caplog.at_level(logging.WARNING, package.__name__):
        model = package.build_videomamba(SimpleNamespace(vision_encoder=section))
    (record,) = caplog.records
    assert record.name == package.__name__ and record.levelno == logging.WARNING and "name" in record.getMessage()
    assert model.config.clip_norm_type == "l2"


@pytest.mark.parametrize("wrapper", [None, "model", "module"])
def test_pretrained_file_is_loaded_strictly(package, tmp_path, wrapper):
    torch.manual_seed(0)
    weights = package.VideoMambaEncoder(package.VideoMambaConfig(**TOY)).state_dict()
    path = tmp_path / "encoder.pth"
    torch.save({wrapper: weights, "epoch": 3} if wrapper else weights, path)
    section = SimpleNamespace(**TOY, pretrained=str(path))
    model = package.build_videomamba(SimpleNamespace(vision_encoder=section))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    same = package.build_videomamba(package.VideoMambaConfig(**TOY, pretrained=str(path)))
    assert same.config.clip_norm_type == "l2"

    del weights["norm.weight"]
    torch.save(weights, path)
    with pytest.raises(RuntimeError, match="norm.weight"):
        package.build_videomamba(SimpleNamespace(vision_encoder=section))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        package.build_videomamba(package.VideoMambaConfig(**TOY, pretrained=str(tmp_path / "nowhere.pth")))
