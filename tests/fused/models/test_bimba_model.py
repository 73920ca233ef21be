"""Bimba with small towers of random weights: its forward, its folders in upstream's layout, and what does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="the towers are models of transformers")

from bimba_folders import CONFIG, model, upstream_state, write, write_adapted  # noqa: E402

from fused import Bimba, CheckpointError, bimba_queries  # noqa: E402
from fused.models.bimba.model import VIDEO_TOKEN, time_instruction  # noqa: E402

IDS = torch.tensor([[1, 2, VIDEO_TOKEN, 3, 4, 5]])
@pytest.fixture
def adapted(tmp_path):
    """(the trained model with merged adapters, the folder of its adapters); the base model is beside it."""
    return write_adapted(tmp_path)


def same(found, due):
    assert found.state_dict().keys() == due.state_dict().keys()
    for name, x in due.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], x, rtol=1e-6, atol=1e-6, msg=name)
    frames = due.prepare_frames(torch.randint(0, 256, (2, 40, 30, 3), dtype=torch.uint8))
    with torch.no_grad():
        torch.testing.assert_close(found(IDS, frames).logits, due(IDS, frames).logits, rtol=1e-4, atol=1e-4)


def test_adapters_projector_and_compressor_are_loaded_onto_the_base_model(adapted):
    trained, folder = adapted
    found = Bimba.from_pretrained(folder)
    same(found, trained)
    assert found.base_folder == folder.parent / "base" and not found.training
    assert not any(x.is_meta for x in (*found.parameters(), *found.buffers()))


def test_a_folder_with_everything_is_loaded(tmp_path):
    """In two files, of a language model whose head is tied, with the vision tower's norm left out."""
    due = model(tie_word_embeddings=True)
    state = upstream_state(due)
    del state["lm_head.weight"]
    first = {k: state.pop(k) for k in list(state)[:20]}
    first = {k: x for k, x in first.items() if "post_layernorm" not in k}
    config = {**CONFIG, "tie_word_embeddings": True}
    write(tmp_path / "all", first, config, "model-00001-of-00002.safetensors")
    folder = write(tmp_path / "all", state, config, "model-00002-of-00002.safetensors")
    found = Bimba.from_pretrained(folder, dtype=torch.bfloat16)
    assert found.mm_projector[0].weight.dtype == torch.bfloat16
    assert found.compressor.layers[0].mixer.A_b_log.dtype == torch.float32
    frames = due.prepare_frames(torch.randint(0, 256, (2, 40, 30, 3), dtype=torch.uint8))
    with torch.no_grad():
        logits, low = due(IDS, frames).logits, found(IDS, frames).logits.float()
    assert (low - logits).norm() < 0.1 * logits.norm()


def test_folders_that_do_not_fit_raise(adapted, tmp_path):
    _, folder = adapted
    with pytest.raises(FileNotFoundError, match="folder is no folder"):
        Bimba.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no compressor"):
        Bimba.from_pretrained(tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="adapters of 'elsewhere', which is no folder here: .* base_model=FOLDER"):
        Bimba.from_pretrained(folder, base_model="elsewhere")
    beside = torch.load(folder / "non_lora_trainables.bin")
    torch.save(beside | {"base_model.model.model.resampler.weight": torch.ones(1)}, folder / "non_lora_trainables.bin")
    with pytest.raises(CheckpointError, match="1 unknown keys, the first is language_model.model.resampler.weight"):
        Bimba.from_pretrained(folder)
    beside.popitem()
    torch.save(beside, folder / "non_lora_trainables.bin")
    with pytest.raises(CheckpointError, match="1 missing keys, the first is compressor"):
        Bimba.from_pretrained(folder)
    (folder / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8, "use_dora": true}')
    with pytest.raises(CheckpointError, match="no plain LoRA"):
        Bimba.from_pretrained(folder, base_model=tmp_path / "base")


@pytest.mark.parametrize(("newline", "count"), [("grid", 3 * 3 * 4), ("frame", 3 * 10), ("no_token", 3 * 9)])
def test_newline_tokens(newline, count):
    bimba = model(mm_newline_position=newline)
    features = torch.randn(3, 5, 5, 32)
    tokens = bimba.compress(features)
    assert tokens.shape == (count, 32)
    due = bimba.compressor(features[None], bimba_queries(features)[None])[0]
    if newline == "grid":
        rows = tokens.view(3, 3, 4, 32)
        assert torch.equal(rows[:, :, 3], bimba.image_newline.expand(3, 3, -1))
        assert torch.equal(rows[:, :, :3].reshape(due.shape), due)


def test_other_grids_than_squares():
    assert model(mm_spatial_pool_mode="average").compress(torch.randn(2, 4, 6, 32)).shape == (2 * 2 * 4, 32)
    assert model(temporal_pooling=2).compress(torch.randn(5, 3, 5, 32)).shape == (2 * 2 * 4, 32)


def test_the_loss_asks_nothing_of_the_video():
    bimba = model()
    frames = bimba.prepare_frames(torch.randint(0, 256, (2, 40, 30, 3), dtype=torch.uint8))
    labels = IDS.clone()
    labels[IDS == VIDEO_TOKEN] = -100
    out = bimba(IDS, frames, labels=labels)
    logits = out.logits[0].log_softmax(-1)
    n = out.logits.shape[1] - IDS.shape[1] + 1
    asked = [(0, 2), (n + 1, 3), (n + 2, 4), (n + 3, 5)]
    due = -sum(logits[place, target] for place, target in asked) / len(asked)
    torch.testing.assert_close(out.loss, due)
    out.loss.backward()
    assert bimba.compressor.layers[0].mixer.in_proj.weight.grad.any()


def test_generation_continues_the_prompt():
    bimba = model()
    frames = bimba.prepare_frames(torch.randint(0, 256, (2, 40, 30, 3), dtype=torch.uint8))
    answer = bimba.generate(IDS, frames, max_new_tokens=3)
    assert answer.shape == (1, 3) and answer[0, 0] == bimba(IDS, frames).logits[0, -1].argmax()


@pytest.mark.usefixtures("unchecked")
def test_frames_and_prompts_that_do_not_fit_raise():
    bimba = model()
    with pytest.raises(ValueError, match=r"frames must have shape \(F, 3, 70, 70\), got \(2, 3, 64, 64\)"):
        bimba(IDS, torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match="1 video tokens .* allowed is none"):
        bimba(IDS)
    with pytest.raises(ValueError, match="0 video tokens .* allowed is one"):
        bimba(torch.tensor([[1, 2]]), torch.randn(2, 3, 70, 70))
    with pytest.raises(ValueError, match="mm_newline_position .*'column'"):
        model(mm_newline_position="column")


def test_a_prompt_with_the_times_of_its_frames():
    class Words:
        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            texts.append(text)
            return [len(texts)]

    texts = []
    assert model().tokenize(Words(), "Who?", [0.0, 1.5], 3.0).tolist() == [[1, VIDEO_TOKEN, 2]]
    assert texts[1].endswith("related to this video.\nWho?<|im_end|>\n<|im_start|>assistant\n")
    assert time_instruction([0.0, 1.5], 3.0).startswith(
        "The video lasts for 3.00 seconds, and 2 frames are uniformly sampled from it. These frames are located at 0.00s,1.50s."
    )


def test_adapters_of_rank_stabilised_lora_in_half_precision(tmp_path):
    """The scale is alpha / sqrt(r), and the sum with a bfloat16 weight is rounded once."""
    _, folder = write_adapted(tmp_path)
    state = {name: x.bfloat16() for name, x in load_file(tmp_path / "base/model.safetensors").items()}
    save_file(state, tmp_path / "base/model.safetensors")
    options = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(options | {"use_rslora": True}))
    found = Bimba.from_pretrained(folder)
    adapters = load_file(folder / "adapter_model.safetensors")
    key = "model.layers.1.self_attn.q_proj"
    A, B = (adapters[f"base_model.model.{key}.lora_{name}.weight"] for name in "AB")
    due = (state[key + ".weight"].float() + 8 / 2**0.5 * (B @ A)).bfloat16()
    assert torch.equal(found.get_parameter(f"language_model.{key}.weight"), due)
    low = Bimba.from_pretrained(folder, dtype=torch.bfloat16).compressor.layers[0].mixer
    assert {low.A_log.dtype, low.A_b_log.dtype, low.D.dtype, low.D_b.dtype} == {torch.float32}
    assert low.in_proj.weight.dtype == torch.bfloat16


def test_a_training_begins_with_a_compressor_that_returns_its_queries(tmp_path):
    _, folder = write_adapted(tmp_path)
    found = Bimba.from_base(tmp_path / "base")
    features = torch.randn(3, 5, 5, 32)
    queries = bimba_queries(features)
    assert torch.equal(found.compressor(features[None], queries[None])[0], queries)
    with pytest.raises(CheckpointError, match="holds adapters; allowed: a base model"):
        Bimba.from_base(folder)


def test_the_kind_of_compressor_is_that_of_the_adapters(tmp_path):
    _, folder = write_adapted(tmp_path, compressor_type="attention")
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"compressor_type": "attention"}))
    base = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({k: v for k, v in base.items() if k != "compressor_type"}))
    assert Bimba.from_pretrained(folder).compressor_kind == "attention"


def test_prepared_frames_lie_between_minus_1_and_1():
    """Bicubic resizing overshoots at edges."""
    frames = torch.zeros(1, 40, 40, 3, dtype=torch.uint8)
    frames[:, :, 20:] = 255
    found = model().prepare_frames(frames)
    assert (found.min(), found.max()) == (-1, 1)


def test_the_video_stands_before_a_question_that_names_its_word():
    class Words:
        def encode(self, text, add_special_tokens):
            return [len(text)]

    plain, named = (model().tokenize(Words(), f"Who{word}?")[0].tolist() for word in ("", "<video>"))
    assert plain[:2] == named[:2] and named[2] == plain[2] + len("<video>")
