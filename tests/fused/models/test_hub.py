"""Models by name, in folders and repositories; files that are there whole or not at all."""

import contextlib
import copy
import json
import multiprocessing
import pickle
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from golden import fill, golden

import fused
from fused import PRETRAINED, CheckpointError, VideoMamba, VideoMambaConfig, VideoMambaEncoder, load_checkpoint, save_checkpoint
from fused.io.preprocessing import Preprocessing
from fused.models.videomamba.published import Published

resource = pytest.importorskip("resource", reason="limits on files are POSIX's")
hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")
LABELS = ("cat", "dog", "Überraschung", "a b", "0")
CUT = Preprocessing(4, (32, 48), "dense", 2, 12.5, "loop", mean=(0.5, 0.5, 0.5), std=(1, 0.25, 0.5))
TOY = {"img_size": (32, 48), "depth": 2, "embed_dim": 32, "num_frames": 4, "num_classes": 5, "clip_output_dim": 12}


def toy(kind=VideoMamba, **overrides):
    return golden(kind(VideoMambaConfig(**TOY | overrides)))


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", [VideoMamba, VideoMambaEncoder])
def test_a_folder_brings_back_the_model(kind, tmp_path):
    model = toy(kind, ssm_cfg={"d_state": 4}, scan_order="both", pretrained="/somewhere/else.pth")
    assert model.save_pretrained(tmp_path / "a") == tmp_path / "a"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    again = kind.from_pretrained(tmp_path / "a", backend="torch")
    assert again.backend == "torch" and not again.training and again.config.pretrained is None
    assert again.config.img_size == (32, 48) and again.config.ssm_cfg == {"d_state": 4}
    same(again, model)


def test_what_is_asked_for_differs_from_what_was_trained(tmp_path):
    """The folder's configuration knows the grid of positions that are no square."""
    model = toy()
    model.save_pretrained(tmp_path)
    other = VideoMamba.from_pretrained(tmp_path, num_classes=3, num_frames=8, img_size=64)
    wanted = VideoMamba(other.config)
    load_checkpoint(wanted, model.state_dict(), grid=(2, 3))
    assert torch.equal(other.pos_embed, wanted.pos_embed) and other.temporal_pos_embedding.shape == (1, 8, 32)
    assert other.head.weight.shape == (3, 32)
    encoder = VideoMambaEncoder.from_pretrained(tmp_path)
    assert torch.equal(encoder.norm.weight, model.norm_f.weight)
    with pytest.raises(ValueError, match="num_classes is -1"):
        VideoMamba.from_pretrained(tmp_path, num_classes=-1)
    with pytest.raises(CheckpointError, match="has embed_dim 32 and depth 2, the model 32 and 3"):
        VideoMamba.from_pretrained(tmp_path, depth=3)


@pytest.mark.filterwarnings("ignore")
def test_the_hubs_own_mixin_reads_and_writes_the_same_folder(tmp_path, capsys):
    class Mixed(hub.PyTorchModelHubMixin, VideoMamba):
        def __init__(self, config: VideoMambaConfig):
            VideoMamba.__init__(self, config)

    model = toy(img_size=32)
    model.labels, model.preprocessing = LABELS, CUT  # which the mixin does not know
    model.save_pretrained(tmp_path / "ours")
    mixed = Mixed.from_pretrained(str(tmp_path / "ours"))
    same(mixed, model)
    mixed.save_pretrained(tmp_path / "theirs")
    back = VideoMamba.from_pretrained(tmp_path / "theirs")
    assert back.config == model.config
    same(back, model)


def test_the_table_names_what_was_published():
    assert len(PRETRAINED) == 63 and all(name + ".pth" == one.file for name, one in PRETRAINED.items())
    one = PRETRAINED["videomamba_m16_k400_mask_ft_f64_res224to384"]
    assert one.config == VideoMambaConfig.middle(num_classes=400, num_frames=64, img_size=384) and one.model == "VideoMamba"
    assert one.url == "https://huggingface.co/OpenGVLab/VideoMamba/resolve/main/videomamba_m16_k400_mask_ft_f64_res224to384.pth"
    assert PRETRAINED["videomamba_b16_in1k_res224"].config == VideoMambaConfig.base(num_frames=None)
    assert PRETRAINED["videomamba_s16_coin_f32_res224"].config.num_classes == 180
    parameters = {}
    for name in ("t16_k400_f8_res224", "t16_in1k_res224", "m16_k400_mask_pt_f8_res224", "m16_25M_f8_res224"):
        entry = PRETRAINED[f"videomamba_{name}"]
        with torch.device("meta"), mock.patch.object(VideoMamba, "_init_weights"):
            model = getattr(fused, entry.model)(entry.config)
        parameters[name] = sum(p.numel() for p in model.parameters())
    assert list(parameters.values()) == [7_033_744, 7_148_008, 73_941_504, 73_942_656]  # the fact sheet's


def test_published_weights_come_from_the_hub(tmp_path, monkeypatch):
    """In the layout of image files, under a name in the table; what huggingface_hub would fetch is asked for, and used."""
    image = toy(num_frames=None, img_size=32)
    torch.save({"model": image.state_dict(), "epoch": 1}, tmp_path / "toy.pth")
    entry = Published("toy.pth", "VideoMamba", image.config)
    monkeypatch.setattr("fused.models.videomamba.hub.PRETRAINED", {"toy": entry})
    with mock.patch.object(hub, "hf_hub_download", return_value=str(tmp_path / "toy.pth")) as fetch:
        same(VideoMamba.from_pretrained("toy", revision="abc"), image)
        video = VideoMamba.from_pretrained("toy", num_frames=2, kernel_size=2, inflate="mean")
    assert fetch.call_args_list[0].args == ("OpenGVLab/VideoMamba", "toy.pth")
    assert fetch.call_args_list[0].kwargs == {"revision": "abc", "cache_dir": None, "token": None, "local_files_only": False}
    assert torch.equal(video.patch_embed.proj.weight[:, :, 1], image.patch_embed.proj.weight / 2)
    image.save_pretrained(tmp_path / "repository")
    with mock.patch.object(hub, "hf_hub_download", side_effect=lambda r, file, **_: str(tmp_path / "repository" / file)):
        same(VideoMamba.from_pretrained("somebody/videomamba"), image)


def test_without_a_network_it_says_what_to_do(tmp_path):
    name = "videomamba_t16_k400_f8_res224"
    words = rf"{name}\.pth of OpenGVLab/VideoMamba could not be .* is not in the cache .*fetch https.*/main/{name}\.pth;"
    with pytest.raises(ConnectionError, match=words):
        VideoMamba.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(ValueError, match="'t16_k400' is no folder.*published are videomamba_t16_k400_f8_res224, "):
        VideoMamba.from_pretrained("t16_k400")
    with pytest.raises(ValueError, match="'unheard_of' is no folder.*the keys of fused.PRETRAINED"):
        VideoMamba.from_pretrained("unheard_of")
    with pytest.raises(ValueError, match="published are videomamba_t16_k400_f8_res224"):  # with two letters mistaken
        VideoMamba.from_pretrained("videomanba_t16_k400_f8_ras224")
    with pytest.raises(FileNotFoundError, match="no configuration"):
        VideoMamba.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"embed_dim": 32, "colour": 1}))
    with pytest.raises(CheckpointError, match="colour"):
        VideoMamba.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        VideoMamba.from_pretrained(tmp_path)


PATHS = [
    "./nowhere", "../nowhere/model", "/no/such/folder", "~/no-such", "~nobody-here/a", "runs/first/model", "here/model",
    "owner/", "a\\b", "owner/last.pth", "last.safetensors", Path("owner/name"),
]  # fmt: skip


@pytest.mark.parametrize("source", PATHS, ids=str)
def test_a_missing_path_is_not_asked_of_the_hub(source, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with mock.patch.object(hub, "hf_hub_download") as fetch, pytest.raises(FileNotFoundError, match="there is no such folder"):
        VideoMamba.from_pretrained(source)
    assert not fetch.called


def test_other_names_of_folders(tmp_path, monkeypatch):
    """~ is the home folder; what is there is taken before a repository of that name; a file is no folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = toy()
    assert model.save_pretrained("~/owner/name") == tmp_path / "owner/name"
    same(VideoMamba.from_pretrained("~/owner/name"), model)
    same(VideoMamba.from_pretrained("owner/name"), model)
    with pytest.raises(ValueError, match=r"is '~/owner/name/config.json', a file; allowed: a folder; load_checkpoint\(model"):
        VideoMamba.from_pretrained("~/owner/name/config.json")
    with pytest.raises(ConnectionError, match="there is no folder someone/name; config.json of someone/name could not be"):
        VideoMamba.from_pretrained("someone/name", cache_dir=tmp_path, local_files_only=True)


def test_a_folder_keeps_class_names_and_preprocessing(tmp_path):
    """Class names as Hugging Face has them."""
    model = toy()
    assert model.labels is None and model.preprocessing is None
    model.labels, model.preprocessing = list(LABELS), CUT
    content = json.loads((model.save_pretrained(tmp_path) / "config.json").read_text(encoding="utf-8"))
    assert content["id2label"] == {"0": "cat", "1": "dog", "2": "Überraschung", "3": "a b", "4": "0"}
    assert content["label2id"] == {"cat": 0, "dog": 1, "Überraschung": 2, "a b": 3, "0": 4}
    assert content["preprocessing"]["size"] == [32, 48] and content["preprocessing"]["fps"] == 12.5
    again = VideoMamba.from_pretrained(tmp_path)
    assert again.labels == LABELS and again.preprocessing == CUT and again.config == model.config
    for copied in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert copied.labels == LABELS and copied.preprocessing == CUT
    assert VideoMambaEncoder.from_pretrained(tmp_path).preprocessing == CUT  # and it has no classes



def test_overrides_and_what_the_folder_says(tmp_path):
    """Other classes have no names; the preprocessing follows the clip's size."""
    model = toy()
    model.labels, model.preprocessing = LABELS, CUT
    model.save_pretrained(tmp_path)
    other = VideoMamba.from_pretrained(tmp_path, num_classes=3, num_frames=8, img_size=64)
    assert other.labels is None and other.preprocessing == replace(CUT, frames=8, size=64)
    assert VideoMamba.from_pretrained(tmp_path, num_classes=5).labels == LABELS
    model.reset_classifier(5)
    assert model.labels is None and model.preprocessing == CUT


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, r"labels has the length 2 \(a, b\); allowed: num_classes \(5\)"),
        ({"id2label": {str(i): "a" for i in range(5)}}, "labels has 'a' twice"),
        ({"id2label": {str(i): str(i) for i in range(1, 6)}}, "id2label has the keys 1, 2, 3, 4, 5, and not 0"),
        ({"id2label": {str(i): i for i in range(5)}}, "labels must be a sequence of names"),
        ({"id2label": ["a"] * 5}, "id2label must map class numbers to names"),
        ({"preprocessing": {"frames": 4, "size": 32, "colour": 1}}, "colour"),
        ({"preprocessing": {"frames": 4}}, "size"),
        ({"preprocessing": {"frames": 4, "size": 0}}, "preprocessing.size is 0; allowed: pixels of a side"),
        ({"preprocessing": {"frames": 4, "size": 32, "std": [1, 1, 0]}}, r"std is \(1, 1, 0\); allowed: three positive"),
        ({"preprocessing": {"frames": 4, "size": 32, "crop": "left"}}, "crop is 'left'; allowed: one of 'centre'"),
        ({"preprocessing": 3}, "is no configuration"),
        ({"depth": 0}, "depth is 0; allowed: a positive integer"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_configuration_that_is_wrong(change, wanted, tmp_path):
    toy().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(CheckpointError, match=f"{tmp_path}/config.json.*{wanted}"):
        VideoMamba.from_pretrained(tmp_path)


def test_push_uploads_what_save_writes():
    uploaded = {}

    class Api:
        def __init__(self, token):
            uploaded["token"] = token

        def create_repo(self, name, **how):
            uploaded["repository"] = name, how

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploaded["model"] = VideoMamba.from_pretrained(folder_path)
            return f"https://huggingface.co/{repo_id}/commit/1"

    model = toy()
    with mock.patch.object(hub, "HfApi", Api):
        assert model.push_to_hub("me/mine", token="t", private=True) == "https://huggingface.co/me/mine/commit/1"
    assert uploaded["repository"] == ("me/mine", {"private": True, "exist_ok": True}) and uploaded["token"] == "t"
    same(uploaded["model"], model)


def test_without_the_libraries_it_says_which(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_checkpoint(toy(), tmp_path / "a.safetensors")
    with pytest.raises(ImportError, match=r"pip install \'videomamba-bench\[hub\]\'"):
        VideoMamba.from_pretrained("videomamba_t16_k400_f8_res224")
    assert not list(tmp_path.iterdir())
    save_checkpoint(toy(), tmp_path / "a.pth")


def child(work):
    """Fork: another process starts at once that way. It may not compute, whose threads it has not inherited."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_killed_while_it_writes(suffix, tmp_path):
    """kill -9 between the first byte of a draft and its end, over and over: one whole checkpoint is always there."""
    path, large = tmp_path / f"last{suffix}", torch.full((1 << 21,), 2.0)

    def write():
        while True:
            save_checkpoint({"x": large}, path)

    for step in range(3):
        save_checkpoint({"step": torch.tensor(step)}, path)
        writer, deadline = child(write), time.monotonic() + 20
        try:
            while not any(0 < size < large.nbytes for size in sizes(tmp_path)):
                assert time.monotonic() < deadline, "no half-written draft was seen"
        finally:
            writer.kill()
            writer.join()
        content = fused.read_checkpoint(path)
        assert content["x"].eq(2).all() if "x" in content else content["step"] == step
    save_checkpoint({"step": torch.tensor(-1)}, path)
    assert fused.read_checkpoint(path)["step"] == -1


def sizes(folder):
    """Of the drafts in it, some of which may go meanwhile."""
    for draft in folder.glob(".*.part"):
        with contextlib.suppress(FileNotFoundError):
            yield draft.stat().st_size


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "model"])
def test_a_disk_that_takes_no_more(name, tmp_path):
    """A limit on the size of files stands in for it: writing fails midway in the same way, with another error number."""
    model, wider, target = toy(), toy(embed_dim=64), tmp_path / name

    def save(what):
        what.save_pretrained(target) if name == "model" else save_checkpoint(what, target)

    def fail():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, 1 << 17))
        try:
            save(wider)
        except OSError as error:
            said.put(str(error))

    save(model)
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    said = multiprocessing.get_context("fork").SimpleQueue()
    child(fail).join()
    text = said.get()
    assert text.startswith(str(target)) and text.count("not written, what was there before stays (") == 1
    assert "MiB are free there" in text
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == files
    if name == "model":
        same(VideoMamba.from_pretrained(target), model)
    else:
        again = VideoMamba(model.config)
        load_checkpoint(again, target)
        same(again, model)


def test_a_loaded_model_works(tmp_path):
    model = toy()
    model.save_pretrained(tmp_path)
    clip = fill(2, 3, 4, 32, 48, phase=7)
    assert torch.equal(VideoMamba.from_pretrained(tmp_path)(clip), model(clip))
