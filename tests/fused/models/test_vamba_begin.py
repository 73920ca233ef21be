"""A training of Vamba that begins with a Qwen2-VL of transformers, which is its teacher too."""

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from language_lists import SIZES, TOWER, write_bimba_base, write_vamba  # noqa: E402

from fused.io.checkpoint_file import CheckpointError  # noqa: E402
from fused.models.vamba.begin import begin  # noqa: E402
from fused.models.vamba.teacher import Place, stock_logits  # noqa: E402
from fused.models.vamba.training import select_trainable  # noqa: E402
from fused.models.vamba.vision import frame_features, pixel_rows  # noqa: E402

START, END, PAD = 20, 21, 22


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return a folder of a Qwen2-VL that transformers wrote, and its model."""
    text = {name: SIZES[name] for name in SIZES if name not in ("mrope_section", "mixer")}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6}
    config = transformers.Qwen2VLConfig(
        text_config={**text, "vocab_size": 40, "rope_parameters": rope, "eos_token_id": 7, "rms_norm_eps": 1e-6},
        vision_config=TOWER, video_token_id=PAD, image_token_id=23, vision_start_token_id=START, vision_end_token_id=END,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    path = tmp_path_factory.mktemp("qwen")
    model.save_pretrained(path)
    return path, model


def test_a_qwen2_vl_becomes_a_vamba(stock: tuple[Path, Any]) -> None:
    path, model = stock
    torch.manual_seed(1)
    net = begin(path, mixer={"headdim": 8, "d_state": 4})
    assert net.config.mrope_section == (2, 1, 1) and net.config.num_hidden_layers == 2 and net.config.rope_theta == 1e6
    assert not any(t.is_meta for t in (*net.parameters(), *net.buffers()))
    theirs = {name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): p
              for name, p in model.state_dict().items()}  # fmt: skip
    ours = net.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    for layer in net.model.layers:
        assert torch.equal(layer.cross_attn.q_proj.weight, layer.self_attn.q_proj.weight)
        assert layer.cross_attn.q_proj.weight.data_ptr() != layer.self_attn.q_proj.weight.data_ptr()
        assert layer.alpha.item() == 0.5
        assert layer.vision_mixer.mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(*(layer.vision_mixer.mixer.in_proj.weight for layer in net.model.layers))
    learnt = select_trainable(net, "pretrain")
    assert set(ours) - set(theirs) >= set(learnt)  # all that learns is new
    video = torch.randn(1, 6, 16)
    assert net(torch.arange(5)[None], video=video).logits.isfinite().all()


def test_the_teacher_is_transformers_qwen2_vl(stock: tuple[Path, Any]) -> None:
    """Of three samples in one row, two of which have videos of different sizes."""
    path, model = stock
    net = begin(path, mixer={"headdim": 8, "d_state": 4})
    g = torch.Generator().manual_seed(0)
    rows, places, features, due = [], [], [], []
    for words, before, side in ((9, 4, (56, 84)), (5, 0, None), (7, 3, (84, 56))):
        ids = torch.randint(0, 20, (words,), generator=g)
        given: dict[str, Any] = {}
        whole, is_text = ids, torch.ones(words, dtype=torch.bool)
        place = Place(words, 0, 0, (0, 0, 0))
        if side is not None:
            ids[before - 1], ids[before] = START, END
            frames = torch.randint(0, 256, (4, 3, *side), dtype=torch.uint8, generator=g)
            features.append(frame_features(net.visual, frames))
            pixels, grid = pixel_rows(frames)
            count = len(features[-1])
            place = Place(words, count, before, (2, side[0] // 28, side[1] // 28))
            whole = torch.cat((ids[:before], torch.full((count,), PAD), ids[before:]))
            is_text = whole != PAD
            given = {"pixel_values_videos": pixels, "video_grid_thw": grid}
            kinds = (whole == PAD).int() * 2
            given["mm_token_type_ids"] = kinds[None]
        rows.append(ids)
        places.append(place)
        with torch.no_grad():
            due.append(model(input_ids=whole[None], attention_mask=torch.ones_like(whole)[None], **given).logits[0, is_text])
    found = stock_logits(net, torch.cat(rows)[None], torch.cat(features)[None], places)
    torch.testing.assert_close(found[0], torch.cat(due), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_other_folders_are_refused(tmp_path: Path, stock: tuple[Path, Any]) -> None:
    with pytest.raises(CheckpointError, match="is neither a Vamba nor a Qwen2-VL"):
        begin(write_bimba_base(tmp_path / "base"))
    with pytest.raises(ValueError, match="is a Vamba; allowed: nothing"):
        begin(write_vamba(tmp_path / "vamba"), mixer={"d_state": 3})
    with pytest.raises(FileNotFoundError, match="config.json"):
        begin(tmp_path)
    with pytest.raises((ValueError, CheckpointError), match="headdim"):
        begin(stock[0], mixer={"headdim": 7})
    net = begin(tmp_path / "vamba")
    assert net.visual is not None and not net.training
    with pytest.raises(ValueError, match="no parameter that can learn has 'nothing' in its name; allowed: parts of model"):
        select_trainable(net, ["alpha", "nothing"])
    assert select_trainable(net, ["alpha"]) == ["model.layers.0.alpha", "model.layers.1.alpha"]


def test_the_head_of_a_small_model_is_its_embedding(stock: tuple[Path, Any], tmp_path: Path) -> None:
    """Files of Qwen2-VL-2B have no lm_head. The backend is that which was asked for."""
    from safetensors.torch import load_file, save_file

    state = load_file(stock[0] / "model.safetensors")
    save_file({name: x for name, x in state.items() if "lm_head" not in name}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((stock[0] / "config.json").read_bytes())
    net = begin(tmp_path, mixer={"headdim": 8, "d_state": 4}, backend="torch")
    assert torch.equal(net.lm_head.weight, net.model.embed_tokens.weight) and net.backend == "torch"
