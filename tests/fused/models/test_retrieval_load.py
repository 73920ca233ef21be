"""Weights of video-text models: the published layout, folders, plain BERT, and files that do not fit."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from retrieval_models import BERT, WORDS, clips, config, model, published, same_bits, vocabulary
from torch import Tensor

from fused import CheckpointError, RetrievalConfig, VideoMambaConfig, VideoTextRetrieval, save_checkpoint
from fused.io.preprocessing import Preprocessing
from fused.models.retrieval.load import load_bert, load_weights
from fused.models.retrieval.words import Tokenizer, clean_text


def write(weights: dict[str, Any], path: Path) -> Path:
    return save_checkpoint(weights, path)


def scores(made: VideoTextRetrieval, words: Path) -> tuple[Tensor, Tensor]:
    """Return similarities and matching logits of two clips and two texts."""
    ids, visible = Tokenizer(words)(["a seven moves left", "six"], 8)
    with torch.no_grad():
        out = made(clips(2), ids, visible)
        return out.similarity, made.match(out.tokens, out.text, visible)


def test_a_published_file_is_loaded_saved_and_loaded_again(tmp_path: Path) -> None:
    """The configuration is read from the shapes; every bit stays; the report says what was dropped, and why."""
    made, words = model(), vocabulary(tmp_path)
    file = write(published(made), tmp_path / "upstream.pth")
    first = VideoTextRetrieval.from_pretrained(file, vocabulary=words)
    assert first.config == config() and same_bits(first, made)
    first.preprocessing, first.text_length = Preprocessing(2, 32, short="last"), 8
    second = VideoTextRetrieval.from_pretrained(first.save_pretrained(tmp_path / "model"))
    assert second.config == first.config and same_bits(second, made)
    assert (second.preprocessing, second.text_length) == (first.preprocessing, 8)
    assert second.tokenizer().size == len(WORDS)
    assert all(torch.equal(x, y) for x, y in zip(scores(made, words), scores(second, words), strict=True))
    again = VideoTextRetrieval.from_pretrained(second.save_pretrained(tmp_path / "model"))  # into its own folder
    assert same_bits(again, made)

    report = load_weights(model(1), published(made))
    assert report.dropped.keys() >= {"clip_teacher.conv1.weight", "text_encoder.cls.predictions.decoder.weight"}
    assert not report.initial and "the teacher of a pretraining" in str(report)


def test_published_weights_by_name(tmp_path: Path) -> None:
    made, hub = model(), pytest.importorskip("huggingface_hub")
    file = write(published(made), tmp_path / "upstream.pth")
    with mock.patch.object(hub, "hf_hub_download", return_value=str(file)) as fetch:
        assert same_bits(VideoTextRetrieval.from_pretrained("videomamba_m16_25M_f8_res224"), made)
    fetch.assert_called_once_with("OpenGVLab/VideoMamba", "videomamba_m16_25M_f8_res224.pth")


def test_a_file_of_a_fine_tuning_has_no_bert_in_its_names(tmp_path: Path) -> None:
    """Upstream's models without the head for masked words: loading leaves nothing at init but that head, and says so."""
    made = model(mlm=False)
    weights = {name.replace("text_encoder.bert.", "text_encoder."): value for name, value in made.state_dict().items()}
    assert same_bits(VideoTextRetrieval.from_pretrained(write(weights, tmp_path / "tuned.pth")), made)
    other = model(1)
    report = load_weights(other, weights)
    assert report.initial.keys() == {name for name in other.state_dict() if name.startswith("text_encoder.cls.")}
    assert torch.equal(other.text_encoder.layers[0].output["dense"].weight, made.text_encoder.layers[0].output["dense"].weight)
    without = load_weights(model(2, mlm=False), published(model(3)))
    assert without.dropped["text_encoder.cls.predictions.bias"] == "the model has no head for masked words"


def test_other_frames_and_fields_by_name(tmp_path: Path) -> None:
    file = write(published(model()), tmp_path / "upstream.pth")
    made = VideoTextRetrieval.from_pretrained(file, num_frames=4, num_attention_heads=4, dropout=0.0)
    assert made.config.video.num_frames == 4 and made.config.num_attention_heads == 4
    folder = made.save_pretrained(tmp_path / "model")
    assert VideoTextRetrieval.from_pretrained(folder, num_frames=2).config.video.num_frames == 2


def broken(change: str) -> dict[str, Any]:
    weights = published(model())["model"]
    match change:
        case "missing":
            del weights["itm_head.bias"]
        case "unknown":
            weights["text_encoder.bert.encoder.layer.0.crossattention.self.query.weight"] = torch.zeros(128, 128)
        case "untied":
            weights["text_encoder.cls.predictions.decoder.weight"] = torch.zeros(len(WORDS), 128)
        case "no text":
            weights = {name: value for name, value in weights.items() if name.startswith("vision_encoder.")}
        case "no video":
            weights = {name: value for name, value in weights.items() if not name.startswith("vision_encoder.")}
    return weights


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "not in the checkpoint: itm_head.bias"), ("unknown", "not in the model: .*layer.0.crossattention"),
        ("untied", "decoder.weight differs"), ("no text", "holds no text encoder"), ("no video", "has no video encoder"),
    ],
)  # fmt: skip
def test_what_does_not_fit_leaves_the_model_unchanged(change: str, said: str) -> None:
    made, twin = model(1), model(1)
    with pytest.raises(CheckpointError, match=said):
        load_weights(made, broken(change))
    assert same_bits(made, twin)


def test_a_bert_of_another_size_says_both_sizes() -> None:
    with pytest.raises(CheckpointError, match=f"{len(WORDS)} words of width 128, the model {len(WORDS)} of 64"):
        load_weights(model(hidden_size=64), published(model()))
    with pytest.raises(CheckpointError, match="not in the checkpoint: .*layer.3"):
        load_weights(model(num_hidden_layers=4), published(model()))


def test_vocabularies(tmp_path: Path) -> None:
    file = write(published(model()), tmp_path / "upstream.pth")
    with pytest.raises(ValueError, match=f"with {len(WORDS) - 1} words; allowed: the {len(WORDS)}"):
        VideoTextRetrieval.from_pretrained(file, vocabulary=vocabulary(tmp_path, WORDS[:-1]))
    with pytest.raises(ValueError, match=r"lacks \[CLS\]"):
        Tokenizer(vocabulary(tmp_path, [word for word in WORDS if word != "[CLS]"]))
    with pytest.raises(FileNotFoundError, match="no such vocabulary"):
        Tokenizer(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="has no vocabulary"):
        model().tokenizer()


@pytest.mark.parametrize("source", ["nothing", "nothing.pth", "videomamba_t16_k400_f16_res224"])
def test_a_model_that_is_not_there(source: str) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such model; allowed: .*videomamba_m16_25M_f8_res224"):
        VideoTextRetrieval.from_pretrained(source)


def test_plain_bert_gives_the_features_of_transformers(tmp_path: Path) -> None:
    """With no layer that reads a video but the last, the first half is BERT without its last layer."""
    transformers = pytest.importorskip("transformers")
    fields = {name: value for name, value in BERT.items() if name not in ("fusion_layer", "embed_dim")}
    torch.manual_seed(0)
    twin = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=len(WORDS), **fields)).eval()
    twin.save_pretrained(tmp_path / "bert")
    made = model(1)
    report = load_bert(made, tmp_path / "bert")
    assert {why for why in report.initial.values()} == {"BERT reads no video"} and "crossattention" in str(report)
    ids, visible = Tokenizer(vocabulary(tmp_path))(["A seven; moves LEFT", "six-moves unheard"], 10)
    with torch.no_grad():
        due = twin.bert(ids, attention_mask=visible.long(), output_hidden_states=True).hidden_states[2]
        assert torch.allclose(made.encode_text(ids, visible)[visible], due[visible], rtol=0, atol=1e-5)
        words = twin(ids, attention_mask=visible.long()).logits
        fused = made.text_encoder.layers[2](made.encode_text(ids, visible), torch.where(visible, 0, -1e4)[:, None, None], None)
        assert torch.allclose(made.text_encoder.predict(fused)[visible], words[visible], rtol=0, atol=1e-4)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_bert(model(hidden_size=64), tmp_path / "bert")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin"):
        load_bert(made, tmp_path)


@pytest.mark.parametrize(
    ("sentence", "clean"),
    [
        ("A man's RED-hat, (2)!", "a mans red hat 2"), ("  <person>\twalks/runs ", "person walks runs"),
        ('"#1": yes? ~no~; *ok*.', "1 yes no ok"), ("", ""),
    ],
)  # fmt: skip
def test_clean_text(sentence: str, clean: str) -> None:
    assert clean_text(sentence) == clean


def test_words_are_padded_and_cut(tmp_path: Path) -> None:
    words = Tokenizer(vocabulary(tmp_path))(["A seven moves, LEFT!", "a a a a a a a a", "zebra"], 6)
    assert words.ids.tolist()[0] == [WORDS.index(w) for w in ("[CLS]", "a", "seven", "moves", "left", "[SEP]")]
    assert words.ids.tolist()[1][-1] == WORDS.index("[SEP]") and words.visible[:2].all()
    assert words.ids.tolist()[2] == [2, 1, 3, 0, 0, 0] and words.visible[2].tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("fusion_layer", 3, "below num_hidden_layers"), ("num_attention_heads", 3, "a divisor of hidden_size"),
        ("dropout", 1.0, "dropout is 1.0"), ("vocab_size", 0, "a positive integer"),
        ("video", VideoMambaConfig(add_pool_norm=False), "add_pool_norm=True"),
        ("video", VideoMambaConfig(num_frames=None), "a number of frames"),
    ],
)  # fmt: skip
def test_wrong_fields(field: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**{field: value})
    with pytest.raises(TypeError, match="the nearest is vocab_size"):
        RetrievalConfig(vocab_sise=3)
