"""Folders of Vamba: shards, sizes read off the weights, the vision tower, and folders that do not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fused import CheckpointError, Vamba, VambaConfig
from fused.models.vamba.vision import frame_features, frame_size, pixel_rows, prepare_frame, vision_tower

SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "mrope_section": (1, 1, 1),
    "mixer": {"headdim": 8, "d_state": 4, "dt_limit": [0.01, 0.5]},
}  # fmt: skip
TOWER = {"depth": 2, "embed_dim": 32, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}


def model(**options):
    torch.manual_seed(0)
    net = Vamba(VambaConfig(**SIZES | options)).eval()
    net.stop_tokens = (3, 5)
    return net


def answers(net):
    video = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(0))
    return net(torch.arange(5)[None], video=video).logits


@pytest.mark.parametrize("shard_bytes", [10_000, 2**30])
def test_a_saved_folder_gives_the_model_back(tmp_path, shard_bytes):
    net = model(cross_attn_use_layer_norm=True, rope_theta=500.0)
    net.save_pretrained(tmp_path, shard_bytes=shard_bytes)
    files = sorted(f.name for f in tmp_path.glob("*.safetensors"))
    assert (len(files) > 2) == (shard_bytes == 10_000)
    assert (tmp_path / "model.safetensors.index.json").exists() == (len(files) > 1)
    back = Vamba.from_pretrained(tmp_path)
    assert torch.equal(answers(back), answers(net))
    assert back.stop_tokens == (3, 5) and not back.training
    assert back.config.mixer["dt_limit"] == [0.01, 0.5]
    net.save_pretrained(tmp_path, shard_bytes=2**30)  # leaves no index of the shards before
    assert torch.equal(answers(Vamba.from_pretrained(tmp_path)), answers(net))


def test_the_report_names_the_mixer_without_effect(tmp_path):
    report = Vamba.from_pretrained(model().save_pretrained(tmp_path)).load_report
    assert len(report.loaded) == len(model().state_dict()) and not report.dropped
    assert report.unused and all(name.startswith("model.layers.1.vision_mixer.") for name in report.unused)
    assert "without effect" in str(report)


@pytest.mark.parametrize("d_state", [4, 8])
def test_sizes_of_the_mixers_are_those_of_the_weights(tmp_path, d_state):
    """Also where config.json says otherwise, or nothing."""
    net = model(mixer={"headdim": 4, "d_state": d_state, "d_conv": 3, "ngroups": 2})
    net.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["vision_mamba_mixer_config"] = {"enable": True, "norm_type": "rmsnorm", "d_state": 999, "ngroups": 2}
    described["text_config"] = {"hidden_act": "silu"} | {key: described.pop(key) for key in list(SIZES)[:6]}
    (tmp_path / "config.json").write_text(json.dumps(described))
    back = Vamba.from_pretrained(tmp_path)
    assert back.config.mixer["d_state"] == d_state
    assert torch.equal(answers(back), answers(net))


def test_sizes_without_alpha_and_with_part_of_the_channels_scanned(tmp_path):
    net = model(use_alpha_balancing=False, mixer={"headdim": 8, "d_state": 4, "d_ssm": 16})
    net.save_pretrained(tmp_path)
    back = Vamba.from_pretrained(tmp_path)
    assert not back.config.use_alpha_balancing
    assert torch.equal(answers(back), answers(net))


def test_decays_stay_in_float32(tmp_path):
    back = Vamba.from_pretrained(model().save_pretrained(tmp_path), dtype=torch.bfloat16)
    kinds = {name.rpartition(".")[2]: p.dtype for name, p in back.named_parameters()}
    assert kinds.pop("A_log") == kinds.pop("D") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}


def test_published_files_have_a_generation_config(tmp_path):
    model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert Vamba.from_pretrained(tmp_path).stop_tokens == (7,)


def edit(folder, **changes):
    """Replace tensors in a folder's file, or leave them out (None)."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lm_head.weight", None, "not in the folder: lm_head.weight"),
        ("model.layers.1.alpha", None, "not in the folder: model.layers.1.alpha"),
        ("model.layers.2.alpha", torch.ones(1), "not in the model: model.layers.2.alpha"),
        ("model.norm.weight", torch.ones(3), "of another shape: model.norm.weight"),
        ("model.layers.0.vision_mixer.mixer.in_proj.weight", None, "is no Vamba"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, name, value, words):
    edit(model().save_pretrained(tmp_path), **{name: value})
    with pytest.raises(CheckpointError, match=words):
        Vamba.from_pretrained(tmp_path)


def test_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        Vamba.from_pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="the folder holds no config.json"):
        Vamba.from_pretrained(tmp_path)
    model().save_pretrained(tmp_path, shard_bytes=10_000)
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    content = first.read_bytes()
    first.write_bytes(content[:50])
    with pytest.raises(CheckpointError, match="damaged"):
        Vamba.from_pretrained(tmp_path)
    first.unlink()
    with pytest.raises(FileNotFoundError, match="shard"):
        Vamba.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="neither"):
        Vamba.from_pretrained(tmp_path)
    model().save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    for content, words in (("[]", "object"), ("{", "no JSON"), (json.dumps(described | {"hidden_size": 17}), "configuration")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=words):
            Vamba.from_pretrained(tmp_path)
    del described["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="vocab_size"):
        Vamba.from_pretrained(tmp_path)


def frames(count, seed=0, height=56, width=84):
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_the_vision_tower_travels_with_the_model(tmp_path):
    pytest.importorskip("transformers")
    net = model()
    net.vision_config, net.visual = TOWER, vision_tower(TOWER).eval()
    net.save_pretrained(tmp_path)
    back = Vamba.from_pretrained(tmp_path, vision=True)
    clip = frames(6)
    cache = back.encode_video(clip)
    assert cache.video_length == 3 * 2 * 3
    assert torch.equal(cache.video_keys[1], net.encode_video(clip).video_keys[1])
    streamed = back.encode_video((part for part in clip.split((1, 3, 2))), chunk=4)
    torch.testing.assert_close(streamed.video_keys[1], cache.video_keys[1])
    odd = back.encode_video(torch.cat((clip, clip[:1])))  # the frame without a partner is left out
    assert torch.equal(odd.video_keys[1], cache.video_keys[1])
    assert back.encode_video(clip[:1]).video_length == 6  # an image is shown twice
    without = Vamba.from_pretrained(tmp_path)
    assert without.visual is None and all(name.startswith("visual.") for name in without.load_report.dropped)
    with pytest.raises(CheckpointError, match="vision tower"):
        Vamba.from_pretrained(model().save_pretrained(tmp_path / "bare"), vision=True)


def test_rows_of_pixels_are_in_the_order_of_merging():
    """Row order (pair, h/2, w/2, 2, 2), values (channel, frame, y, x)."""
    clip = frames(4)
    rows, grid = pixel_rows(clip)
    assert grid.tolist() == [[2, 4, 6]] and rows.shape == (48, 1176)
    pixels = (clip.float() / 255 - torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    ).view(3, 1, 1)
    for row, (pair, y, x) in {0: (0, 0, 0), 1: (0, 0, 1), 2: (0, 1, 0), 4: (0, 0, 2), 12: (0, 2, 0), 24: (1, 0, 0)}.items():
        patch = pixels[2 * pair : 2 * pair + 2, :, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14]
        torch.testing.assert_close(rows[row], patch.transpose(0, 1).flatten())


def test_features_of_pairs_do_not_depend_on_how_many_pass_together(monkeypatch):
    pytest.importorskip("transformers")
    tower, clip = vision_tower(TOWER).eval(), frames(8)
    whole = frame_features(tower, clip)
    assert whole.shape == (4 * 2 * 3, 16)
    monkeypatch.setattr("fused.models.vamba.vision.PAIRS_AT_ONCE", 1)
    torch.testing.assert_close(frame_features(tower, clip), whole)
    for wrong in (clip[:3], clip[:, :2], clip[..., :50], clip[0]):
        with pytest.raises(ValueError, match="frames have shape"):
            frame_features(tower, wrong)


def test_sizes_of_frames_are_upstreams():
    assert frame_size(360, 640) == (364, 644)  # 299 tokens a pair
    assert frame_size(1080, 1920, longest=480) == (280, 476)  # 170 tokens a pair: 270 and 480 before rounding
    assert frame_size(720, 1280, longest=360) == (252, 364)  # 117: the short side is raised to 256
    frame = torch.full((40, 60, 3), 7, dtype=torch.uint8)
    assert torch.equal(prepare_frame(frame, (28, 56)), torch.full((3, 28, 56), 7, dtype=torch.uint8))


def test_shards_keep_to_their_size_and_take_the_place_of_a_single_file(tmp_path):
    net = model()
    net.save_pretrained(tmp_path)
    net.save_pretrained(tmp_path, shard_bytes=10_000)
    assert not (tmp_path / "model.safetensors").exists() and torch.equal(answers(Vamba.from_pretrained(tmp_path)), answers(net))
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file).values()
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors) <= 10_000
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    net.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()  # which would name the shards of before


def test_the_vision_towers_section_says_nothing_of_the_decoder(tmp_path):
    net = model(rms_norm_eps=0.25)
    described = json.loads((net.save_pretrained(tmp_path) / "config.json").read_text())
    decoder = {key: described.pop(key) for key in (*list(SIZES)[:6], "rms_norm_eps")}
    described = {"vision_config": TOWER | {"rms_norm_eps": 0.5}} | described | {"text_config": decoder}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert Vamba.from_pretrained(tmp_path).config.rms_norm_eps == 0.25


def test_frames_are_scaled_by_their_longer_side_and_smoothed():
    assert frame_size(400, 1920, longest=480) == (252, 476)
    stripes = torch.zeros(84, 84, 3, dtype=torch.uint8)
    stripes[:, 1::3] = 255  # of three columns the middle one, which alone would be seen without antialiasing
    assert prepare_frame(stripes, (84, 28)).max() < 128
