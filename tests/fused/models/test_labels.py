"""Class names of a model, and answers by name."""

import pytest
import torch

from fused import VideoMamba, VideoMambaConfig
from fused.models.videomamba.labels import labels_from_json, labels_to_json


def named(*labels: str) -> VideoMamba:
    model = VideoMamba(VideoMambaConfig(img_size=16, num_frames=1, depth=1, embed_dim=16, num_classes=len(labels))).eval()
    model.labels = labels
    return model


def test_the_most_likely_classes_by_name() -> None:
    """With the probabilities of the softmax, in float32 whatever the logits are."""
    model = named("cat", "dog", "cow")
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -9.0, 3.5]])
    answers = model.top_labels(logits, top=2)
    assert [[name for name, _ in answer] for answer in answers] == [["dog", "cow"], ["cow", "cat"]]
    expected = logits.softmax(dim=1)
    assert answers[0][0][1] == expected[0, 1] and answers[1][1][1] == expected[1, 0]
    assert model.top_labels(logits.bfloat16(), top=1)[0][0][1] == expected[0, 1]
    assert [len(answer) for answer in model.top_labels(logits)] == [3, 3]  # five of three classes are three
    assert model.top_labels(model(torch.zeros(1, 3, 1, 16, 16)), top=1)[0][0][0] in ("cat", "dog", "cow")
    assert model.top_labels(logits[:0]) == []


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("labels", "error", "wanted"),
    [
        (["a"], ValueError, r"labels has the length 1 \(a\); allowed: num_classes \(2\), a name for each class"),
        ([f"c{i}" for i in range(8)], ValueError, r"the length 8 \(c0, c1, c2, c3, c4 and 3 more\)"),
        (["a", "a"], ValueError, "labels has 'a' twice; allowed: names that differ and are not empty"),
        (["a", ""], ValueError, "labels has ''; allowed"),
        ("ab", TypeError, "labels must be a sequence of names, or None, got 'ab'"),
        ([1, 2], TypeError, "labels must be a sequence of names, or None"),
        ({"a": 0, "b": 1}, TypeError, "labels must be a sequence of names, or None"),
    ],
)
def test_names_that_do_not_fit(labels: object, error: type[Exception], wanted: str) -> None:
    model = named("cat", "dog")
    with pytest.raises(error, match=wanted):
        model.labels = labels  # type: ignore[assignment]
    assert model.labels == ("cat", "dog")


def test_classes_are_counted_as_numbers() -> None:
    """The keys of a JSON file are text, by which 10 comes before 2."""
    names = [f"class {i}" for i in range(12)]
    shuffled = dict(sorted(labels_to_json(names)["id2label"].items()))
    assert list(shuffled)[1] == "1" and list(shuffled)[2] == "10"
    assert labels_from_json(shuffled, 12) == tuple(names)


def test_answers_that_cannot_be_given() -> None:
    model, logits = named("cat", "dog"), torch.zeros(1, 2)
    for wrong, error, wanted in (
        (torch.zeros(1, 3), ValueError, r"logits must be \(B, num_classes\), here \(B, 2\), got \(1, 3\)"),
        (torch.zeros(2), ValueError, r"got \(2,\)"),
    ):
        with pytest.raises(error, match=wanted):
            model.top_labels(wrong)
    with pytest.raises(ValueError, match="top must be an integer from 1 up, got 0"):
        model.top_labels(logits, top=0)
    model.labels = None
    with pytest.raises(ValueError, match="labels is None: .* set model.labels"):
        model.top_labels(logits)
