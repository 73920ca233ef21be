"""Video-text training: captions, the order of videos and images, gradients over processes, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from moving_squares import CAPTIONS, folder, words
from retrieval_models import model, published
from videos import write_images

from fused import VideoMamba, VideoMambaConfig, VideoMambaEncoder, VideoTextRetrieval, save_checkpoint
from fused.train.__main__ import main
from fused.train.config_file import read_config
from fused.train.data.captioned import CaptionData
from fused.train.data.captions import read_captions
from fused.train.loop import Trainer
from fused.train.parallel import World
from harness.instruments.two_processes import Training, log, run_trainings, tensors

CPU = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("squares") / "videos", 2)


@pytest.fixture(autouse=True)
def settings_come_back(unchecked: None):
    with torch.random.fork_rng():
        yield
    torch.use_deterministic_algorithms(False)


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def trainer(captions: Path, out: Path, *more: str) -> Trainer:
    torch.manual_seed(0)
    return Trainer(read_config(None, words(captions, out, "batch_size=4", "steps=2", *more)), CPU)


# files of captions


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.json", "list.jsonl"])
def test_the_same_captions_from_every_kind_of_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.avi").touch()
    (tmp_path / "b.avi").touch()
    text = {
        "list.csv": 'path,caption\na.avi,"one, two"\nb.avi,three\n', "list.tsv": "a.avi\tone, two\nb.avi\tthree\n",
        "list.json": json.dumps([{"video": "a.avi", "caption": "one, two"}, {"video": "b.avi", "caption": ["three"]}]),
        "list.jsonl": '{"video": "a.avi", "caption": "one, two"}\n\n{"video": "b.avi", "caption": ["three"]}\n',
    }[name]  # fmt: skip
    found = read_captions(write(tmp_path / name, text))
    assert [entry.captions for entry in found.entries] == [("one, two",), ("three",)] and not found.notes
    assert [entry.paths for entry in found.entries] == [(tmp_path / "a.avi",), (tmp_path / "b.avi",)]


def test_columns_in_another_order_ids_and_paragraphs(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.avi").touch()
    found = read_captions(write(tmp_path / "list.csv", "\ufeffid,Text,video_path\nx,one,a.avi\n\nx,two,b.avi\n"))
    assert [(e.identity, e.captions) for e in found.entries] == [("x", ("one",)), ("x", ("two",))]
    items = [{"video": ["a.avi", "b.avi"], "caption": "both"}, {"video": "c.avi", "caption": ["First.", "Then."], "fps": 3}]
    file = write(tmp_path / "list.json", items)
    assert [e.captions for e in read_captions(file).entries] == [("both",), ("First.", "Then.")]
    found = read_captions(file, paragraph=True)
    assert found.entries[1].captions == ("First. Then.",) and len(found.entries[0].paths) == 2
    assert "keys that are not read: 'fps' (1 times)" in found.notes[0]


def test_videos_that_are_not_there_and_videos_without_captions(tmp_path: Path) -> None:
    for name in ("a", "b", "other"):
        (tmp_path / f"{name}.avi").touch()
    notes = read_captions(write(tmp_path / "list.csv", "a.avi,one\nb.avi,two\ngone.avi,three\n")).notes
    assert "1 of 3 videos that were looked for are not there" in notes[0] and "gone.avi" in notes[0]
    assert "1 videos have no caption in list.csv, and are not read" in notes[1] and "other.avi" in notes[1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("l.csv", "a.avi,one, two\nb.avi,x, y\n", "line 1 has 3 cells; allowed: 2, path,caption; a caption that holds a comma"),
        ("l.csv", "a.avi,\n", "has .* caption"),
        ("l.csv", 'a.avi,"one\n', "is no CSV"), ("l.csv", "", "holds no caption"), ("l.csv", ",one\n", "line 1 has no path"),
        ("l.csv", "path,caption,id\na.avi,x\n", "line 2 has 2 cells; allowed: 3"),
        ("l.jsonl", "[]\n{", "no JSON in every line"),
        ("l.json", {"video": "a"}, "holds a dict"), ("l.json", [3], "entry 0 is a int"), ("l.json", "[", "is no JSON"),
        ("l.json", [{"video": "a.avi", "captions": "x"}], "entry 0 has the keys 'video', 'captions'; allowed: 'caption'"),
        ("l.json", [{"video": "a.avi", "image": "b.png", "caption": "x"}], "one of 'video' and 'image'"),
        ("l.json", [{"video": "a.avi", "caption": 3}], "has 3 for 'caption'"),
        ("l.json", [{"video": "a.avi", "caption": ["x", "y"], "answer": 2}], "the answer 2; allowed: 0 to 1"),
        ("l.json", [{"video": "a.avi", "caption": ["x", " "]}], "entry 0 has an empty caption; allowed"),
        ("l.json", [{"video": ["a.avi", ""], "caption": "x"}], "entry 0 has no path; allowed"),
        ("l.csv", "gone.avi,one\n", "names 1 videos; none is there"),
    ],
)  # fmt: skip
def test_files_that_are_refused(name: str, content: object, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.avi").touch()
    with pytest.raises(ValueError, match=said) as error:
        read_captions(write(tmp_path / name, content))
    assert name in str(error.value)
    with pytest.raises(ValueError, match="no such folder"):
        read_captions(tmp_path / name, tmp_path / "nothing")


# pairs and their order


def test_pairs_have_the_ids_that_say_what_is_right(captions: Path, tmp_path: Path) -> None:
    """Two videos have each caption: with text.ids=video they are wrong answers of each other, and a note says so."""
    by_caption, by_video = (
        CaptionData(read_config(None, words(captions, tmp_path, "batch_size=4", "steps=1", f"text.ids={kind}")))
        for kind in ("caption", "video")
    )
    assert len(set(by_caption.ids)) == len(CAPTIONS) and len(set(by_video.ids)) == 2 * len(CAPTIONS)
    assert not by_caption.notes and by_video.notes[0].startswith(f"{captions}: 6 captions are of several videos")
    assert by_caption.captions == tuple(CAPTIONS * 2)


def test_videos_and_images_alternate_in_one_order(captions: Path, tmp_path: Path) -> None:
    """Each batch is of one kind; two processes have the same kinds; what was skipped is not taken again."""
    write_images(tmp_path / "images", [f"{i}.png" for i in range(8)])
    rows = "".join(f"{i}.png,a seven\n" for i in range(8))
    images = write(tmp_path / "images/captions.csv", rows)
    more = ("batch_size=4", "steps=1", f"data.images={images}", "text.ids=video")
    config = read_config(None, words(captions, tmp_path, *more))
    data = CaptionData(config)
    assert len(data) == 12 + 8 and len(data.batches(config, 0, 0, 0, 1)) == 3 + 2
    assert not set(data.ids[:12]) & set(data.ids[12:])
    orders = []
    for epoch in range(4):
        whole = [(batch.clips.dim(), batch.labels.tolist()) for batch in data.batches(config, epoch, 0, 0, 1)]
        assert all((dims == 4) == (min(labels) >= 12) == (max(labels) >= 12) for dims, labels in whole)
        rest = [(batch.clips.dim(), batch.labels.tolist()) for batch in data.batches(config, epoch, 2, 0, 1)]
        halves = [[batch.clips.dim() for batch in data.batches(config, epoch, 0, rank, 2)] for rank in (0, 1)]
        orders.append([dims for dims, _ in whole])
        assert rest == whole[2:] and halves[0] == halves[1] == orders[-1]
    assert len(set(map(tuple, orders))) > 1
    made = trainer(captions, tmp_path / "run", f"data.images={images}", "optim.lr=1e-3")
    assert made.run() is False and {"vtc", "vtm", "mlm", "temperature"} <= log(tmp_path / "run")[-1].keys()


# the loss, its gradients and what is written


def test_gradients_of_two_processes_are_those_of_one(captions: Path, tmp_path: Path) -> None:
    """The contrast over both, in float64: Adam's first moment is (1 - beta) times the gradient of the mean over processes.

    Upstream's are half of that but for the temperature, whose gradient is complete in every process.
    """
    more = ("batch_size=6", "steps=1", "loss.vtm=0", "loss.mlm=0", "save_every=1", "optim.weight_decay=0", "text.ids=video")
    kinds = {"one": (), "two": ("parallel=ddp",), "upstream": ("parallel=ddp", "loss.gather=upstream")}
    trainings = [
        Training(tuple(words(captions, tmp_path / name, *more, *own)), name != "one", True) for name, own in kinds.items()
    ]
    run_trainings(trainings, tmp_path)
    moments = {}
    for name in kinds:
        found = tensors(tmp_path / name / "checkpoints/step-00000001")
        moments[name] = {key: x for key, x in found.items() if key.startswith("optimizer.exp_avg.")}
    assert moments["one"].keys() == moments["two"].keys() and len(moments["one"]) > 40
    largest = max(x.abs().max() for x in moments["one"].values())
    for key, due in moments["one"].items():
        assert (moments["two"][key] - due).abs().max() <= 1e-12 * largest, key
        share = 1.0 if key.endswith(".temp") else 0.5
        assert (moments["upstream"][key] - share * due).abs().max() <= 1e-12 * largest, key
    losses = {name: log(tmp_path / name)[0]["loss"] for name in kinds}
    assert losses["one"] == pytest.approx(losses["two"], rel=1e-12) == pytest.approx(losses["upstream"], rel=1e-12)


def test_a_training_goes_on_bit_for_bit_and_writes_a_whole_model(captions: Path, tmp_path: Path) -> None:
    assert trainer(captions, tmp_path / "whole", "steps=4", "save_every=2").run() is False
    assert trainer(captions, tmp_path / "parts", "steps=4", "save_every=2", "text.length=8").run() is False
    first, second = (VideoTextRetrieval.from_pretrained(tmp_path / name / "model") for name in ("whole", "parts"))
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))
    (tmp_path / "parts/checkpoints/last").write_text("step-00000002\n")
    again = trainer(captions, tmp_path / "parts", "steps=4", "save_every=2")
    assert again.step == 2 and again.run() is False
    second = VideoTextRetrieval.from_pretrained(tmp_path / "parts/model")
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))
    assert second.text_length == 8 and second.preprocessing.frames == 2 and second.tokenizer().size == first.config.vocab_size
    assert 0.001 <= second.temp.item() <= 0.5


def test_a_batch_without_negatives_has_no_matching_loss(captions: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "one.csv", "".join(f"{captions.parent}/0{i}.avi,a seven\n" for i in range(4)))
    task = trainer(one, tmp_path / "run", f"text.vocabulary={captions.parent / 'words.txt'}").task.train()
    clips = torch.randn(4, 3, 2, 32, 32)
    inputs = task.prepare(clips, task.encode(torch.arange(4)), torch.Generator().manual_seed(0))
    loss, parts = task(*inputs)
    assert parts["vtm"] == 0 and loss == parts["vtc"] + parts["mlm"]
    loss.backward()
    assert all(p.grad is not None for p in task.student.parameters()) and not task.student.itm_head.weight.grad.any()


def test_alignment_with_a_teacher(captions: Path, tmp_path: Path) -> None:
    """A VideoMamba as teacher, masked tokens: the loss has its part, and the weights count."""
    VideoMamba(VideoMambaConfig(img_size=32, num_frames=2, embed_dim=32, depth=1)).save_pretrained(tmp_path / "teacher")
    for kind in ("tube", "random"):
        more = ("loss.uta=2", "loss.mlm=0", f"teacher={tmp_path / 'teacher'}", f"mask.kind={kind}", "mask.ratio=0.5")
        made = trainer(captions, tmp_path / kind, *more)
        task, generator = made.task.train(), torch.Generator().manual_seed(0)
        inputs = task.prepare(torch.randn(4, 3, 2, 32, 32), task.encode(torch.arange(4)), generator)
        assert inputs[-2].shape == (4, 1 + 2 * 2)  # CLS, and half of 8 tokens
        loss, parts = task(*inputs)
        assert loss.item() == pytest.approx((parts["vtc"] + parts["vtm"] + 2 * parts["uta"]).item(), rel=1e-6)
        loss.backward()
        assert made.task.student.vision_encoder.clip_decoder[0].head.weight.grad.abs().max() > 0


def test_clip_aligns_videos_and_images(captions: Path, tmp_path: Path) -> None:
    """CLIP's attention leaves 4 of the 16 tokens of each frame of a video, and 8 of an image, which it sees as one frame."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=12)
    transformers.CLIPVisionModelWithProjection(vision).save_pretrained(tmp_path / "clip")
    write_images(tmp_path / "images", [f"{i}.png" for i in range(4)])
    images = write(tmp_path / "images/captions.csv", "".join(f"{i}.png,a seven\n" for i in range(4)))
    more = ("loss.uta=1", f"teacher={tmp_path / 'clip'}", "mask.kind=attention", "model.patch_size=8", f"data.images={images}")
    made = trainer(captions, tmp_path / "run", *more, "data.frames=4")
    task, generator = made.task.train(), torch.Generator().manual_seed(0)
    for pixels, first, seen in ((torch.randn(4, 3, 4, 32, 32), 0, 16), (torch.randn(4, 3, 32, 32), 12, 8)):
        inputs = task.prepare(pixels, task.encode(torch.arange(first, first + 4)), generator)
        assert inputs[-2].shape == (4, 1 + seen) and inputs[-1].shape == (1, 4, 1 + seen, 12)
        loss, parts = task(*inputs)
        assert 0 < parts["uta"] < 4 and loss.isfinite()


def test_where_a_training_starts(captions: Path, tmp_path: Path) -> None:
    """A whole model's folder or file; an encoder, beside which the text starts anew."""
    whole = model(vocab_size=19)
    whole.vocabulary = captions.parent / "words.txt"
    encoder = VideoMambaEncoder(VideoMambaConfig(img_size=32, num_frames=2, embed_dim=32, depth=1)).eval()
    starts = {
        "folder": whole.save_pretrained(tmp_path / "folder"), "file": save_checkpoint(published(whole), tmp_path / "file.pth"),
        "encoder": save_checkpoint(encoder, tmp_path / "encoder.pth"),
    }  # fmt: skip
    base = [word for word in words(captions, tmp_path / "run", "batch_size=4", "steps=1") if not word.startswith("model.")]
    for name, start in starts.items():
        own = base if name == "encoder" else [word for word in base if "text.bert" not in word]
        own = [word for word in own if name != "folder" or "vocabulary" not in word]
        own += ["model.depth=1", "model.embed_dim=32"] * (name == "encoder")
        student = Trainer(read_config(None, [*own, f"start={start}"]), CPU).task.student
        source = encoder if name == "encoder" else whole.vision_encoder
        assert torch.equal(student.vision_encoder.layers[0].mixer.A_log, source.layers[0].mixer.A_log)
        assert torch.equal(student.text_proj.weight, whole.text_proj.weight) == (name != "encoder")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("text.vocabulary=null", "text.vocabulary is None"), ("text.length=9", "text.length is 9; allowed: at most BERT's 8"),
        ("text.bert.hiden_size=3", "text.bert.hidden_size"), ("loss.vtc=0 loss.vtm=0 loss.mlm=0", "loss.vtc is 0; allowed"),
        ("loss.uta=1", "teacher is None"), ("text.bert.mlm=false", "loss.mlm is 1.0; allowed: 0"),
        ("mix.mixup=0.5", "task 'retrieval' does not read it"), ("parallel=fsdp", "parallel is 'fsdp'; allowed: 'auto'"),
        ("text.bert.fusion_layer=2", "fusion_layer is 2; allowed: below"), ("data.train=nothing.csv", "data.train: captions"),
        ("batch_size=64", "allowed: up to the 12 videos"), ("text.start=nothing", "no such checkpoint"),
        ("data.frames=null", "data.frames is None"),
    ],
)  # fmt: skip
def test_what_is_refused(more: str, said: str, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(captions, tmp_path / "run", "batch_size=4", "steps=1"), *more.split()]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_task_does_not_read_texts(captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task=finetune", f"out={tmp_path}", f"data.train={captions.parent}", "steps=1", "text.length=8"]) == 2
    assert "text.length is given; task 'finetune' does not read it" in capsys.readouterr().err
