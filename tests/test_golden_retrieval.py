"""Numbers that upstream's retrieval model gave (video_mm), reproduced by both packages."""

import importlib
from types import ModuleType

import pytest
import torch
from golden import assert_golden, assert_sums, fill, golden

BERT = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 16, "fusion_layer": 2, "embed_dim": 16,
}  # fmt: skip
IDX = torch.tensor([0, 1, 2, 1, 4])
NEGATIVE_VIDEOS, NEGATIVE_TEXTS = torch.tensor([1, 0, 3, 4, 2]), torch.tensor([2, 4, 0, 0, 3])


@pytest.fixture(params=["reference", "fused"])
def package(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"{request.param}.models.retrieval" + ".model" * (request.param == "fused"))


def inputs():
    """Return tokens, pooled, ids and visible of R1."""
    tokens, pooled = fill(5, 9, 24, phase=7), fill(5, 3, 24, phase=5)
    place = 7 * torch.arange(5)[:, None] + torch.arange(7)
    ids = (7 * place + 3) % 47 + 3
    ids[:, 0] = 1
    ids[1, 5:] = 0
    return tokens, pooled, ids, ids != 0


def heads(package: ModuleType):
    if package.__name__.startswith("fused"):
        from fused import RetrievalConfig, VideoMambaConfig

        config = RetrievalConfig(**BERT, dropout=0.0, video=VideoMambaConfig(embed_dim=24, depth=1))
    else:
        config = package.RetrievalConfig(**BERT, video_width=24)
    model = golden(package.VideoTextHeads(config))
    torch.nn.init.constant_(model.temp, 0.07)
    return model


def losses():
    """Return both packages' contrastive, matching and masked-language losses by package."""
    from fused import train
    from reference.models import retrieval

    return {"reference.models.retrieval": retrieval, "fused.models.retrieval.model": train}


@torch.no_grad()
def test_r1(package):
    model, (tokens, pooled, ids, visible), loss = heads(package), inputs(), losses()[package.__name__]
    text = model.text_encoder.text(ids, visible)
    assert_golden(text, "-0.308206 0.615279 -0.914293 1.072965 0.656720 -0.561515")
    assert_sums(text, str(text.double().sum().item()), "899.46596")
    v2t = model.similarity(pooled, text)
    assert_golden(v2t, "0.536274 -0.264420 0.629301 -0.445113 0.814888 -0.214723")
    assert_sums(v2t, "-6.45300", "40.42849")
    assert_golden(loss.contrastive_loss(v2t, IDX)[None], "2.400599")

    every = torch.arange(5)
    videos, texts = torch.cat((every, NEGATIVE_VIDEOS, every)), torch.cat((every, every, NEGATIVE_TEXTS))
    logits = model.match(tokens[videos], text[texts], visible[texts])
    assert_golden(loss.matching_loss(logits)[None], "0.936369")

    masked, labels = ids.clone(), torch.full_like(ids, -100)
    labels[:, 2], masked[:, 2] = ids[:, 2], 2
    words = model.predict_words(tokens, masked, visible)
    assert_golden(words, "-0.729421 -0.133753 -0.050877 -0.438507 2.039628 1.588782")
    assert_sums(words, "-1.51863", "1475.59156")
    assert_golden(loss.masked_language_loss(words, labels)[None], "5.402314")


@torch.no_grad()
def test_r1_weights_of_negatives(package):
    """Upstream's weights; `fused` draws by them, so that their law is seen in many draws."""
    model, (_, pooled, ids, visible) = heads(package), inputs()
    v2t = model.similarity(pooled, model.text_encoder.text(ids, visible))
    if package.__name__.startswith("reference"):
        w_t2v, w_v2t = package.negative_weights(v2t.T, IDX), package.negative_weights(v2t, IDX)
        assert_golden(w_t2v[0], "0 0.0625509 0.0013848 0.7253626 0.0781493")
        assert_golden(w_t2v[1], "0.0165427 0 0.0002953 0 0.0124760")
        assert_golden(w_v2t[0], "0 0.1058350 0.2586840 0.0883400 0.3114360")
        assert_sums(w_t2v, "2.93778")
        assert_sums(w_v2t, "3.52237")
        return
    from fused.train import matching_pairs

    generator, count = torch.Generator().manual_seed(0), 2000
    drawn = torch.zeros(2, 5, 5)
    for _ in range(count):
        pairs = matching_pairs(v2t, IDX, generator)
        drawn[0, torch.arange(5), pairs.texts[5:10]] += 1  # a negative text of each video
        drawn[1, torch.arange(5), pairs.videos[10:]] += 1
    weights = "0 0.1058350 0.2586840 0.0883400 0.3114360", "0 0.0625509 0.0013848 0.7253626 0.0781493"
    for got, first in zip(drawn, weights, strict=True):
        due = torch.tensor([float(x) for x in first.split()])
        due /= due.sum()
        assert (got[IDX[:, None] == IDX] == 0).all()
        assert ((got[0] / count - due).abs() <= 5 * (due * (1 - due) / count).sqrt()).all()
