"""Questions to a BIMBA by the command: folders of adapters and whole ones, with random tiny models."""

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("av")

from bimba_folders import CONFIG, model, upstream_state, write, write_adapted  # noqa: E402
from byte_tokenizers import byte_tokenizer  # noqa: E402

from fused import Bimba  # noqa: E402
from fused.chat.__main__ import main  # noqa: E402
from fused.chat.bimba import BimbaConversation  # noqa: E402
from fused.io.repeated_frames import even_places  # noqa: E402
from fused.io.video import decode_frames  # noqa: E402

VIDEO = Path(__file__).resolve().parents[2] / "data/bigbuckbunny.mp4"
WORDS = {"vocab_size": 258}  # bytes, and the two special tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters whose base model, with the tokenizer, is beside them."""
    path = tmp_path_factory.mktemp("bimba")
    adapters = write_adapted(path, **WORDS)[1]
    byte_tokenizer(["<|im_start|>", "<|im_end|>"]).save_pretrained(path / "base")
    return adapters


def run(folder, *words):
    return main(["--model", str(folder), "--max-new-tokens", "5", "--device", "cpu", *words])


def test_the_command_finds_a_bimba_and_compresses_the_video_once(folder, capsys, monkeypatch):
    compressed = []
    original = Bimba.compress
    monkeypatch.setattr(Bimba, "compress", lambda self, x: compressed.append(len(x)) or original(self, x))
    assert run(folder, "--video", str(VIDEO), "--frames", "3", "--question", "Who?", "--question", "Where is it?") == 0
    out, err = capsys.readouterr()
    assert compressed == [3] and len(out.splitlines()) >= 2
    assert "36 video tokens in" in err and "compressed tokens" in err and err.count("the first token after") == 2


def test_answers_are_those_of_the_model(folder):
    """Frames at linspace's places, whole prompts, and a cache of keys give what `generate` gives."""
    talk = BimbaConversation.open(folder)
    talk.watch(VIDEO, frames=20)  # more than are in the tower at a time
    images = {n: x for n, x in decode_frames(VIDEO, lambda total, times: sorted(set(even_places(total, 20))))}
    found = Bimba.from_pretrained(folder)
    frames = found.prepare_frames(torch.stack([images[n] for n in sorted(images)]))
    for question in ("Who?", "Where is it?", "Who?"):
        ids = found.tokenize(talk.tokenizer, question)
        tokens = found.generate(ids, frames, max_new_tokens=6, eos_token_id=257)[0].tolist()
        due = talk.tokenizer.decode([t for t in tokens if t != 257])
        assert "".join(talk.ask(question, max_new_tokens=6)) == due


def test_without_a_video_the_question_alone_is_read(folder, capsys):
    assert run(folder, "--question", "Who?", "--temperature", "1", "--top-p", "0.5") == 0
    assert capsys.readouterr().err.count("the first token after") == 1
    talk, read = BimbaConversation.open(folder), []
    embed = talk.model.embed
    talk.model.embed = lambda ids, video: read.append(ids) or embed(ids, video)
    list(talk.ask("Who?", max_new_tokens=1))
    whole = talk.model.tokenize(talk.tokenizer, "Who?")[0]
    assert read[0][0].tolist() == whole[whole >= 0].tolist() != whole.tolist()


def test_the_base_model_is_named_where_the_folder_does_not(folder, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    options = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(options | {"base_model_name_or_path": "lmms-lab/elsewhere"}))
    assert run(moved, "--question", "?") == 2
    assert "lmms-lab/elsewhere" in capsys.readouterr().err
    assert run(moved, "--base-model", str(folder.parent / "base"), "--question", "?") == 0


def test_a_whole_folder_needs_no_base_model(tmp_path):
    """Its config.json says what it is, by the compressor or by LLaVA's model type."""
    for name, config in (("a", {"model_type": "llava_qwen"}), ("b", {"model_type": "qwen2", "compressor_type": "mamba"})):
        whole = write(tmp_path / name, upstream_state(model(**WORDS)), {**CONFIG, **WORDS, **config})
        byte_tokenizer(["<|im_start|>", "<|im_end|>"]).save_pretrained(whole)
        assert run(whole, "--question", "?") == 0


def test_wrong_options_are_said_and_end_with_2(folder, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "vamba"}')
    for words, said in (
        (("--frames", "0"), "frames must be an integer from 1 up, got 0"),
        (("--longest", "640"), "--longest is an option of a Vamba"),
        (("--offload",), "--offload is an option of a Vamba"),
        (("--temperature", "-1"), "temperature"),
        (("--base-model", str(tmp_path / "none")), "base_model"),
        (("--model", str(tmp_path), "--base-model", "x"), "is no BIMBA"),
        (("--device", "gpu"), "device string: gpu"),
        (("--frames", "43"), "frames is 43, 516 video tokens; allowed: 42, by max_position_embeddings 512"),
    ):
        assert run(folder, "--video", str(VIDEO), *words, "--question", "?") == 2
        assert said in capsys.readouterr().err


def test_what_can_be_said_before_the_model_is_read_is(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Bimba, "from_pretrained", lambda *a, **k: pytest.fail("weights are read"))
    copied = shutil.copytree(folder.parent, tmp_path / "copy")
    (copied / "base/tokenizer.json").unlink()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for words, said in (
        (("--device", "cuda"), "--device is 'cuda', and PyTorch finds no GPU; allowed here: cpu"),
        (("--max-new-tokens", "0"), "max_new_tokens must be an integer from 1 up, got 0"),
        (("--top-p", "0"), "top_p must be a number in (0, 1], got 0.0"),
        (("--temperature", "nan"), "temperature must be a number in [0, inf), got nan"),
        (("--base-model", str(copied / "base")), f"{copied / 'base'} holds no tokenizer that transformers reads; allowed: tok"),
    ):
        assert run(folder, *words, "--question", "?") == 2
        assert said in capsys.readouterr().err


def test_frames_and_questions_that_do_not_fit_are_said_before_a_frame_is_read(folder, monkeypatch):
    talk = BimbaConversation.open(folder)
    talk.watch(VIDEO, frames=1)
    with pytest.raises(ValueError, match="the question and the video are 5[0-9][0-9] tokens; allowed: 512, max_position_emb"):
        talk.ask("x" * 500)
    monkeypatch.setattr("fused.chat.bimba.RepeatedFrames", lambda *a: pytest.fail("a video is read"))
    monkeypatch.setattr(talk.model, "temporal_pooling", 3)
    monkeypatch.setitem(talk.model.config, "temporal_pooling", 3)
    with pytest.raises(ValueError, match="frames is 2; allowed: from 3 up, temporal_pooling"):
        talk.watch(VIDEO, frames=2)
    with pytest.raises(ValueError, match="frames is 129, 516 video tokens; allowed: 126, by max_position_embeddings 512"):
        talk.watch(VIDEO, frames=129)


def test_an_image_and_a_video_of_one_frame_are_shown_in_every_place(folder, tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 30), (90, 20, 10)).save(tmp_path / "one.png")
    talk = BimbaConversation.open(folder)
    alone, four = (talk.watch(tmp_path / "one.png", frames=n).tokens for n in (1, 4))
    assert alone.shape[0] == 12 and four.shape[0] == 48
    assert "".join(talk.ask("Who?", max_new_tokens=2)) is not None


def test_an_interrupt_ends_the_command_in_mid_answer(folder, capsys, monkeypatch):
    def interrupted(self, question, **options):
        yield "The rab"
        raise KeyboardInterrupt

    monkeypatch.setattr(BimbaConversation, "ask", interrupted)
    assert run(folder, "--question", "Who?", "--question", "Why?") == 130
    out, err = capsys.readouterr()
    assert out == "The rab" and "Traceback" not in err


def test_the_times_of_the_frames_are_told_where_that_is_asked_for(folder, tmp_path, monkeypatch):
    from PIL import Image

    talk, told = BimbaConversation.open(folder), []
    original = Bimba.tokenize
    monkeypatch.setattr(Bimba, "tokenize", lambda self, *a: told.append(a[2:]) or original(self, *a))
    talk.watch(VIDEO, frames=3, times=True)
    times = []
    list(decode_frames(VIDEO, lambda total, given: times.extend(given) or [0]))
    "".join(talk.ask("Who?", max_new_tokens=1))
    last = len(times) - 1
    due = [times[0], times[last // 2], times[last]]
    assert told == [(due, pytest.approx(2 * times[last] - times[last - 1]))]
    talk.watch(VIDEO, frames=3)
    "".join(talk.ask("Who?", max_new_tokens=1))
    assert told[1] == (None, None)
    Image.new("RGB", (40, 30)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="is a folder of images, which has none"):
        talk.watch(tmp_path, frames=2, times=True)


def test_places_are_linspaces():
    assert even_places(10, 4) == [0, 3, 6, 9]
    assert even_places(2, 4) == [0, 0, 0, 1]
    assert even_places(7, 1) == [0]


def test_a_short_video_repeats_frames(folder, tmp_path):
    from PIL import Image

    for number in range(2):
        Image.new("RGB", (40, 30), (90 * number, 20, 10)).save(tmp_path / f"{number:03}.png")
    talk = BimbaConversation.open(folder)
    found = talk.watch(tmp_path, frames=4)
    images = torch.stack([x for _, x in decode_frames(tmp_path, lambda total, times: [0, 1])])
    with torch.no_grad():
        due = talk.model.compress(talk.model.encode_frames(talk.model.prepare_frames(images))[[0, 0, 0, 1]])
    assert found.video_length == 4 * 12
    torch.testing.assert_close(found.tokens, due)


def test_a_frame_is_a_video(folder):
    assert BimbaConversation.open(folder).watch(VIDEO, frames=1).video_length == 12
