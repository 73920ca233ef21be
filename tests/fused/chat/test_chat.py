"""Questions about a video file, by the command, with a random tiny model."""

import io
import json
from pathlib import Path

import pytest
import torch
from byte_tokenizers import byte_tokenizer

from fused import Vamba, VambaConfig
from fused.chat import session
from fused.chat.__main__ import main
from fused.io.repeated_frames import middle_places
from fused.models.conversation.tokenizer import read_tokenizer
from fused.models.vamba.vision import vision_tower

pytest.importorskip("transformers")
pytest.importorskip("av")

VIDEO = Path(__file__).resolve().parents[2] / "data/bigbuckbunny.mp4"
TOWER = {"depth": 1, "embed_dim": 32, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights with a tokenizer of bytes, as published folders have them."""
    path = tmp_path_factory.mktemp("vamba")
    fast = byte_tokenizer(SPECIAL)
    fast.save_pretrained(path)
    torch.manual_seed(0)
    net = Vamba(
        VambaConfig(
            vocab_size=len(fast), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, mrope_section=(2, 1, 1), mixer={"headdim": 8, "d_state": 4},
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
        net.lm_head.weight[fast.convert_tokens_to_ids("a")] += 0.5
    net.vision_config, net.visual = TOWER, vision_tower(TOWER)
    net.save_pretrained(path)
    return path


def run(folder, *words):
    options = ["--model", str(folder), "--frames", "4", "--longest", "112", "--max-new-tokens", "5", "--device", "cpu"]
    return main([*options, *words])


def test_the_command_answers_questions_and_reads_the_video_once(folder, capsys, monkeypatch):
    reads = []
    original = Vamba.encode_video
    monkeypatch.setattr(Vamba, "encode_video", lambda self, *a, **b: reads.append(1) or original(self, *a, **b))
    assert run(folder, "--video", str(VIDEO), "--question", "Who?", "--question", "Where is it?") == 0
    out, err = capsys.readouterr()
    assert len(reads) == 1 and len(out.splitlines()) >= 2
    assert "video tokens in" in err and "keys and values" in err and err.count("the first token after") == 2


def test_answers_are_those_of_the_model(folder):
    talk = session.Conversation.open(folder)
    cache = talk.watch(VIDEO, frames=4, longest=112)
    assert cache.video_length == 2 * 9 * 9  # both sides are raised to 256 pixels
    first, other = ("".join(talk.ask(q, max_new_tokens=6)) for q in ("Who?", "Where is it?"))
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|vision_end|>Who?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = talk.tokenizer(prompt, return_tensors="pt")["input_ids"]
    stop = talk.tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokens = talk.model.generate(cache, ids, max_new_tokens=6, stop_tokens=[stop])[0].tolist()
    assert first == talk.tokenizer.decode([t for t in tokens if t != stop])
    assert "".join(talk.ask("Who?", max_new_tokens=6)) == first  # the question between left nothing behind


def test_questions_are_read_line_by_line(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n\nWhere?\n"))
    assert run(folder) == 0
    assert capsys.readouterr().err.count("the first token after") == 2


def test_letters_of_several_tokens_come_whole(folder):
    talk = session.Conversation.open(folder)
    tokens = talk.tokenizer("é!", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 3
    talk.model.stream = lambda *a, **b: iter(torch.tensor([[t] for t in tokens]))
    assert list(talk.ask("?")) == ["é", "!"]
    talk.model.stream = lambda *a, **b: iter(torch.tensor([[tokens[0]]]))
    assert list(talk.ask("?")) == ["\ufffd"]  # an answer that was cut within a letter is not lost


def test_the_token_that_ends_an_answer_is_not_shown(folder):
    talk = session.Conversation.open(folder)
    stop = talk.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert list(session.pieces(talk.tokenizer, [*talk.tokenizer("ab")["input_ids"], stop, 97], {stop})) == ["a", "b"]


def test_a_short_video_repeats_its_last_frame(folder, tmp_path):
    from PIL import Image

    for number in range(2):
        Image.new("RGB", (40, 30), (90 * number, 20, 10)).save(tmp_path / f"{number:03}.png")
    talk = session.Conversation.open(folder)
    assert talk.watch(tmp_path, frames=6).video_length == 3 * talk.watch(tmp_path, frames=2).video_length


def test_wrong_input_is_said_and_ends_with_2(folder, tmp_path, capsys):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    for words, said in (
        (("--video", str(tmp_path / "none.mp4")), "no such file"),
        (("--video", str(broken)), "broken.mp4"),
        (("--video", str(VIDEO), "--frames", "1"), "frames"),
        (("--video", str(VIDEO), "--longest", "3"), "longest"),
        (("--video", str(VIDEO), "--times"), "--times is an option of a BIMBA"),
        (("--question", "?", "--temperature", "-1"), "temperature"),
        (("--model", str(tmp_path)), "config.json"),
    ):
        assert run(folder, *words, "--question", "?") == 2
        assert said in capsys.readouterr().err


def published(folder, path, **changed):
    """Write the folder as published weights are, in shards, with other values in config.json; return the path."""
    Vamba.from_pretrained(folder, vision=True).save_pretrained(path, shard_bytes=8000)
    for file in folder.glob("*token*"):
        (path / file.name).write_bytes(file.read_bytes())
    described = json.loads((path / "config.json").read_text()) | changed
    (path / "config.json").write_text(json.dumps({key: value for key, value in described.items() if value is not None}))
    return path


def test_shards_answer_as_one_file_does(folder, tmp_path, capsys):
    for model in (folder, published(folder, tmp_path / "shards")):
        assert main(["--model", str(model), "--device", "cpu", "--question", "Who?", "--max-new-tokens", "4"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rope_scaling": [1]}, "config.json: rope_scaling is [1]; allowed: an object"),
        ({"rope_scaling": {"mrope_section": "x"}}, "mrope_section is 'x'; allowed"),
        ({"vision_mamba_mixer_config": "x"}, "config.json: vision_mamba_mixer_config is 'x'; allowed: an object"),
        ({"vision_mamba_mixer_config": {"ngroups": 0}}, "config.json: ngroups is 0; allowed: a positive integer"),
        ({"vision_mamba_mixer_config": {"ngroups": "1"}}, "config.json: ngroups is '1'; allowed: a positive integer"),
        ({"vision_mamba_mixer_config": {"dt_limit": 3}}, "no configuration of a Vamba"),
        ({"vision_config": None}, "holds no vision tower: it lacks vision_config in config.json"),
        ({"vision_config": [1]}, "config.json: vision_config is [1]; allowed: an object"),
        ({"vision_config": TOWER | {"depth": "x"}}, "config.json: vision_config is none of a Qwen2-VL"),
        ({"vision_config": TOWER | {"depth": 2}}, "not in the folder: visual.blocks.1."),
        ({"eos_token_id": "x"}, "config.json: eos_token_id is 'x'; allowed: the number of a token, or a list of them"),
        ({"num_attention_heads": "2"}, "num_attention_heads is '2'; allowed: a positive integer"),
        ({"vocab_size": None}, "config.json lacks 'vocab_size'"),
    ],
)
def test_a_wrong_config_is_said(folder, tmp_path, changed, said, capsys):
    assert run(published(folder, tmp_path, **changed), "--question", "?") == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and str(tmp_path) in error


def test_files_that_are_missing_or_of_another_kind_are_said(folder, tmp_path, capsys, monkeypatch):
    path = published(folder, tmp_path / "model")
    shard = sorted(path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    assert run(path, "--question", "?") == 2
    assert "git lfs pull fetches" in capsys.readouterr().err
    shard.write_bytes(whole)
    for model, said in ((tmp_path / "none", "there is no such folder"), (shard, "it is a file; allowed: the folder of a")):
        assert run(model, "--question", "?") == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(Vamba, "from_pretrained", lambda *a, **b: pytest.fail("weights were read"))
    (path / "tokenizer.json").write_text("{")
    assert run(path, "--question", "?") == 2
    assert f"{path} holds no tokenizer that transformers reads" in capsys.readouterr().err


def test_the_library_does_not_warn_of_a_folder_that_this_package_wrote(folder, monkeypatch):
    library = pytest.importorskip("transformers")
    logging, heard = library.utils.logging, []
    monkeypatch.setattr(library.AutoTokenizer, "from_pretrained", lambda *a, **b: heard.append(logging.get_verbosity()))
    before = logging.get_verbosity()
    read_tokenizer(folder)
    assert heard == [logging.ERROR] and logging.get_verbosity() == before


def test_a_number_of_frames_beyond_all_memory_is_refused_before_the_video_is_opened(folder, monkeypatch):
    talk = session.Conversation.open(folder)
    monkeypatch.setattr(session, "RepeatedFrames", lambda *a: pytest.fail("the video was opened"))
    with pytest.raises(ValueError, match=r"1000000000 frames are 40500000000 video tokens.* GiB are free; allowed: about"):
        talk.watch(VIDEO, frames=10**9)


def test_questions_that_are_no_utf8_are_asked(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Who\xff?\nWhere?\n"), encoding="utf-8"))
    assert run(folder) == 0
    assert capsys.readouterr().err.count("the first token after") == 2


def test_an_interrupt_within_an_answer_ends_with_130(folder, capsys, monkeypatch):
    answer = session.Conversation.ask

    def interrupted(self, question, **options):
        for piece in answer(self, question, **options):
            yield piece
            raise KeyboardInterrupt

    monkeypatch.setattr(session.Conversation, "ask", interrupted)
    assert run(folder, "--question", "Who?", "--question", "Where?") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_too_many_frames_are_refused_before_any_is_read_by_the_model(folder, monkeypatch):
    talk = session.Conversation.open(folder)
    monkeypatch.setattr(session, "free_bytes", lambda device: 30_000)
    monkeypatch.setattr("fused.models.vamba.prefill.frame_features", lambda *a: pytest.fail("frames passed the tower"))
    with pytest.raises(ValueError, match=r"64 frames are 2592 video tokens.* GiB.*offload"):
        talk.watch(VIDEO, frames=64, longest=112)


def test_memory_of_the_published_model():
    cached, scratch = session.video_bytes(VambaConfig.qwen2_vl_7b(), 153_088, torch.bfloat16)
    assert cached == 56 * 1024 * 153_088 and scratch < 3 * 2**30
    assert session.free_bytes(torch.device("cpu")) > 0
    assert session.free_bytes(torch.device("meta")) is None


def test_places_are_upstreams():
    assert middle_places(8, 4) == [1, 3, 5, 7]
    assert middle_places(10, 4) == [1, 3, 6, 8]
    assert middle_places(3, 5) == [0, 1, 2, 2, 2]
    assert middle_places(4, 4) == [0, 1, 2, 3]


def test_offloaded_keys_take_memory_of_the_host_and_not_of_the_device(folder, monkeypatch):
    talk = session.Conversation.open(folder)
    cached, scratch = session.video_bytes(talk.model.config, 2 * 9 * 9, torch.float32)
    talk.device = torch.device("meta")
    free = {"meta": scratch, "cpu": cached}
    monkeypatch.setattr(session, "free_bytes", lambda device: free[device.type])

    def read(*given):
        raise RuntimeError("frames passed the tower")

    monkeypatch.setattr("fused.models.vamba.prefill.frame_features", read)
    with pytest.raises(RuntimeError, match="passed the tower"):
        talk.watch(VIDEO, frames=4, longest=112, offload=True)
    with pytest.raises(ValueError, match="GiB on meta"):
        talk.watch(VIDEO, frames=4, longest=112)
    free["cpu"] -= 1
    with pytest.raises(ValueError, match="GiB on cpu"):
        talk.watch(VIDEO, frames=4, longest=112, offload=True)


def test_a_video_is_forgotten_before_the_next_is_read(folder, monkeypatch):
    """Two do not have to fit into the memory."""
    talk, held = session.Conversation.open(folder), []
    talk.watch(VIDEO, frames=2, longest=112)
    original = Vamba.encode_video
    monkeypatch.setattr(Vamba, "encode_video", lambda self, *a, **b: held.append(talk.video) or original(self, *a, **b))
    talk.watch(VIDEO, frames=2, longest=112)
    assert held == [None] and talk.video is not None
