"""Retrieval: ranks and their ties, scores against those of all pairs, what is kept on disk, and what is said of bad input."""

import gc
import json
import weakref
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from moving_squares import CAPTIONS, folder, square
from retrieval_models import WORDS, model, vocabulary
from torch import Tensor
from trainings import run_two

from fused import VideoTextRetrieval
from fused.evaluate.__main__ import main
from fused.evaluate.feature_store import FeatureStore
from fused.evaluate.retrieval import RetrievalEvaluation, evaluate_retrieval
from fused.evaluate.retrieval_settings import RetrievalSettings
from fused.io.preprocessing import Preprocessing
from fused.models.retrieval.ranking import dual_softmax, ranks, recalls, summary
from fused.train.interrupt import Interrupt
from reference.models import retrieval as reference


def settings(**fields: Any) -> RetrievalSettings:
    return RetrievalSettings(**{"workers": 0, "device": "cpu", **fields})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("squares") / "videos", 2)


@pytest.fixture
def made(data: Path) -> VideoTextRetrieval:
    found = model()
    found.vocabulary, found.preprocessing, found.text_length = data.parent / "words.txt", Preprocessing(2, 32), 8
    return found


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


# ranks


def test_ranks_of_ties_are_those_of_numpys_reversed_order() -> None:
    """Of equal scores the higher number comes first: a constant is right for the last candidate only, not for all."""
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, -1.0, 5.0, 5.0]])
    for column, due in enumerate(([2, 3, 2], [1, 2, 3], [0, 1, 1], [3, 0, 0])):
        right = torch.zeros(3, 4, dtype=torch.bool)
        right[:, column] = True
        assert ranks(scores, right).tolist() == due == reference.ranks(scores, right).tolist()
    eye = torch.eye(40, dtype=torch.bool)
    assert recalls(ranks(torch.zeros(40, 40), eye), (1,)).item() == 2.5
    assert recalls(ranks(torch.eye(40), eye)).tolist() == [100, 100, 100]


def test_the_best_of_several_right_answers_counts_and_the_lost_are_last() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1], [0.3, 0.2, 0.1]]).repeat(1, 4)
    right = torch.zeros(3, 12, dtype=torch.bool)
    right[0, [0, 2]] = right[1, 1] = True
    found = summary(scores, right, lost=1)  # ranks 5 (behind four 0.9, of 0.5 the last but the higher ones), 7, 13, 13
    assert found == {"r1": 0.0, "r5": 0.0, "r10": 50.0, "r_mean": 16.67, "median_rank": 10.5}
    for n in (3, 5):  # no R@5 of three or of five
        assert summary(torch.eye(n), torch.eye(n, dtype=torch.bool)) == {"r1": 100.0, "median_rank": 1.0}
    with pytest.raises(ValueError, match="not finite"):
        ranks(torch.full((1, 2), torch.nan), torch.ones(1, 2, dtype=torch.bool))


def test_dual_softmax_lowers_what_is_near_to_all() -> None:
    """The first candidate is nearest to every query, and most of all to the first."""
    similarities = torch.tensor([[0.9, 0.1, 0.1], [0.6, 0.55, 0.1], [0.6, 0.1, 0.55]])
    eye = torch.eye(3, dtype=torch.bool)
    assert ranks(similarities, eye).tolist() == [0, 1, 1]
    assert ranks(dual_softmax(similarities, 0.07), eye).tolist() == [0, 0, 0]


# scores


def all_pairs(made: VideoTextRetrieval, paths: list[Path], texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return cosines and matching scores (texts, videos), one pair at a time."""
    words = made.tokenizer()(texts, made.text_length)
    cosine, match = torch.zeros(2, len(texts), len(paths))
    with torch.no_grad():
        for (i, path), j in product(enumerate(paths), range(len(texts))):
            clip = made.preprocessing.read(path)[None]
            out = made(clip, words.ids[j : j + 1], words.visible[j : j + 1])
            cosine[j, i] = out.similarity * made.temp
            match[j, i] = made.match(out.tokens, out.text, words.visible[j : j + 1])[0, 1]
    return cosine, match


def expected(scores: Tensor, right: Tensor) -> dict[str, float]:
    """Return R@1, R@5, R@10 by counting candidates that are better, or equal and of a higher number."""
    place = torch.arange(scores.shape[1])
    found = []
    for row, answers in zip(scores, right, strict=True):
        better = [int(((row > row[i]) | ((row == row[i]) & (place > i))).sum()) for i in answers.nonzero().flatten().tolist()]
        found.append(min(better))
    return {f"r{k}": round(100 * sum(x < k for x in found) / len(found), 2) for k in (1, 5, 10)}


def shares(found: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if name in ("r1", "r5", "r10")}


def test_scores_are_those_of_every_pair_by_itself(
    made: VideoTextRetrieval, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matching of all candidates, and of three: the rest counts as behind, whatever its matching score is."""
    monkeypatch.setattr("fused.evaluate.video_text.TEXTS_AT_ONCE", 5)
    monkeypatch.setattr("fused.evaluate.video_text.VIDEOS_AT_ONCE", 5)
    paths = [data.parent / f"{i}{j}.avi" for i in range(2) for j in range(6)]
    texts = CAPTIONS * 2
    cosine, match = all_pairs(made, paths, texts)
    right = torch.eye(12, dtype=torch.bool)
    for count in (128, 3):
        found = evaluate_retrieval(made, data, tmp_path / f"{count}", settings(rerank=count, batch_size=5)).numbers
        for direction, cosines, matches, answers in (
            ("text_to_video", cosine, match, right), ("video_to_text", cosine.T, match.T, right.T)
        ):
            assert shares(found[direction]["cosine"]) == expected(cosines, answers)
            best = cosines.topk(min(count, 12), dim=1).indices
            kept = torch.full_like(matches, -100).scatter(1, best, matches.gather(1, best))
            assert shares(found[direction][f"matching of {count}"]) == expected(kept, answers)
    queries = [json.loads(line) for line in (tmp_path / "128/queries.jsonl").read_text().splitlines()]
    assert [query["text"] for query in queries] == texts and queries[0]["videos"] == [str(paths[0])]
    assert json.loads((tmp_path / "3/results.json").read_text()) == found
    place = torch.arange(12)
    for number, (query, row) in enumerate(zip(queries, match, strict=True)):
        better = (row > row[number]) | ((row == row[number]) & (place > number))
        assert query["rank"] == 1 + int(better.sum())
        assert query["first"] == str(paths[max(range(12), key=lambda i: (row[i].item(), i))])


def test_the_same_captions_as_one_text(made: VideoTextRetrieval, data: Path, tmp_path: Path) -> None:
    """Two videos fit each caption; as texts of their own each has one right answer, and a note says so."""
    apart = evaluate_retrieval(made, data, tmp_path, settings(rerank=0)).numbers
    merged = evaluate_retrieval(made, data, tmp_path, settings(rerank=0, merge_captions=True)).numbers
    assert (apart["texts"], merged["texts"]) == (12, 6)
    assert "captions are of several videos" in " ".join(apart["notes"]) and not any("several" in n for n in merged["notes"])
    assert "R@10 are left out where there are 6 texts" in " ".join(merged["notes"])
    assert merged["text_to_video"]["cosine"]["median_rank"] <= apart["text_to_video"]["cosine"]["median_rank"]


def test_several_captions_of_a_video_and_several_videos_of_a_caption(
    made: VideoTextRetrieval, data: Path, tmp_path: Path
) -> None:
    items = [
        {"video": "00.avi", "caption": CAPTIONS[:3]}, {"video": ["01.avi", "02.avi"], "caption": CAPTIONS[3]},
        {"video": "03.avi", "caption": CAPTIONS[4]},
    ]  # fmt: skip
    file = write(data.parent / "several.json", items)
    paths, texts = [data.parent / f"0{i}.avi" for i in range(4)], CAPTIONS[:5]
    right = torch.zeros(5, 4, dtype=torch.bool)
    right[[0, 1, 2], 0] = right[3, 1] = right[3, 2] = right[4, 3] = True
    found = evaluate_retrieval(made, file, tmp_path / "out", settings(rerank=0)).numbers
    cosine, _ = all_pairs(made, paths, texts)
    assert found["text_to_video"]["cosine"]["r1"] == expected(cosine, right)["r1"]
    assert found["video_to_text"]["cosine"]["r1"] == expected(cosine.T, right.T)["r1"]


def test_multiple_choice(made: VideoTextRetrieval, data: Path, tmp_path: Path) -> None:
    """0.7 of the matching probability and 0.3 of the softmax of cosines over the temperature."""
    choices = [CAPTIONS[:3], CAPTIONS[2:], CAPTIONS[1:5]]
    paths = [data.parent / f"0{i}.avi" for i in range(3)]
    due = []
    for path, texts in zip(paths, choices, strict=True):
        words = made.tokenizer()(texts, 8)
        with torch.no_grad():
            out = made(made.preprocessing.read(path)[None], words.ids, words.visible)
            matched = made.match(out.tokens, out.text, words.visible).softmax(dim=1)[:, 1]
        due.append(int((0.7 * matched + 0.3 * out.similarity[0].softmax(dim=0)).argmax()))
    items = [
        {"video": path.name, "caption": texts, "answer": (answer if i else (answer + 1) % 3)}
        for i, (path, texts, answer) in enumerate(zip(paths, choices, due, strict=True))
    ]
    file = write(data.parent / "choice.json", items)
    results = evaluate_retrieval(made, file, tmp_path / "out", settings())
    assert results.numbers["accuracy"] == 66.67 and [query["chosen"] for query in results.queries] == due
    lost = [*items, {"video": "gone.avi", "caption": choices[0], "answer": 0}]
    results = evaluate_retrieval(made, write(data.parent / "lost.json", lost), tmp_path / "out", settings())
    assert results.numbers["accuracy"] == 50.0 and results.queries[3]["chosen"] is None  # of all, read or not
    for number in (0, 2):
        some = [item | {"answer": None} if i == number else item for i, item in enumerate(items)]
        with pytest.raises(ValueError, match="an answer in 2 of 3 entries"):
            evaluate_retrieval(made, write(data.parent / "some.json", some), tmp_path / "out", settings())


# what is kept, and what is read


def test_features_are_made_once_and_a_stop_loses_none(
    made: VideoTextRetrieval, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a stop behind the first batch the rest is encoded; other precision or preprocessing is encoded anew."""
    seen: list[int] = []
    encode = VideoTextRetrieval.encode_video

    def counted(self: VideoTextRetrieval, clips: Tensor, **options: Any) -> Any:
        seen.append(len(clips))
        return encode(self, clips, **options)

    monkeypatch.setattr(VideoTextRetrieval, "encode_video", counted)
    stop = Interrupt()
    stop.requested = True
    options = settings(batch_size=5, rerank=4)
    assert RetrievalEvaluation(made, data, tmp_path, options).run(stop) is None and seen == [5]
    results = RetrievalEvaluation(made, data, tmp_path, options).run()
    assert seen == [5, 5, 2] and results is not None
    again = RetrievalEvaluation(made, data, tmp_path, settings(batch_size=1, rerank=4)).run()
    assert again is not None and again.numbers == results.numbers and seen == [5, 5, 2]
    for other in (settings(sampling="borders"), settings(precision="bfloat16"), settings(short="last", first_seconds=0.1)):
        before = sum(seen)
        RetrievalEvaluation(made, data, tmp_path, other).run()
        assert sum(seen) == before + 12
    changed = data.parent / "00.avi"
    content = changed.read_bytes()
    square(changed, "black", "left", frames=5)
    before = sum(seen)
    RetrievalEvaluation(made, data, tmp_path, options).run()
    assert sum(seen) == before + 1
    changed.write_bytes(content)


def test_tokens_of_one_video_are_in_memory_at_a_time(
    made: VideoTextRetrieval, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand videos of VideoMamba-M are 3.6 GB on disk."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    load = FeatureStore.load

    def watched(self: FeatureStore, video: Path) -> Any:
        nonlocal most
        found = load(self, video)
        alive.append(weakref.ref(found.tokens))
        most = max(most, sum(ref() is not None for ref in alive))
        return found

    monkeypatch.setattr(FeatureStore, "load", watched)
    gc.collect()
    evaluate_retrieval(made, data, tmp_path, settings())
    assert len(alive) == 24 and most <= 2  # for the cosines, and for matching


def test_a_video_that_cannot_be_read_counts_as_never_found(made: VideoTextRetrieval, data: Path, tmp_path: Path) -> None:
    broken = data.parent / "broken.avi"
    broken.write_bytes(b"no video")
    rows = [("00.avi", CAPTIONS[0]), ("broken.avi", CAPTIONS[1]), ("gone.avi", CAPTIONS[2]), ("03.avi", CAPTIONS[3])]
    file = data.parent / "some.csv"
    file.write_text("".join(f"{path},{text}\n" for path, text in rows))
    results = evaluate_retrieval(made, file, tmp_path, settings())
    numbers = results.numbers
    assert (numbers["videos"], numbers["read"], numbers["texts"]) == (4, 2, 4)
    assert all(found["r1"] <= 50 for found in numbers["text_to_video"].values())
    assert all(found["r1"] <= 50 for found in numbers["video_to_text"].values())
    assert [query["rank"] is None for query in results.queries] == [False, True, True, False]
    assert "2 of 4 videos were read" in str(results) and "1 of 4 videos that were looked for are not there" in str(results)
    broken.unlink()


def test_two_processes_give_the_results_of_one(made: VideoTextRetrieval, data: Path, tmp_path: Path) -> None:
    model_folder = made.save_pretrained(tmp_path / "model")
    words = ["--task", "retrieval", "--model", str(model_folder), "--data", str(data), "workers=0", "device=cpu", "rerank=4"]
    text = run_two("fused.evaluate", [*words, "--out", str(tmp_path / "two")], tmp_path)
    assert text.count("text to video, 12 texts among 12 videos, by cosine") == 1, text
    due = evaluate_retrieval(model_folder, data, tmp_path / "one", settings(rerank=4)).numbers
    assert json.loads((tmp_path / "two/results.json").read_text()) == due


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("vocabulary={short}", "with 18 words; allowed: the 19"), ("text_length=17", "text_length is 17; allowed: at most"),
        ("--views 3", "--views is given"), ("rerank=-1", "rerank is -1"), ("frames=4 size=32", ""), ("crop=middle", "crop is"),
        ("batchsize=3", "batch_size"), ("backend=native", "backend 'native' cannot run here"),
        ("sampling=segments --data {nothing}", "captions are in"),
        ("--model {data}", "captions.csv is text, no checkpoint, or it is damaged"),
    ],
)  # fmt: skip
def test_bad_input(
    words: str, said: str, made: VideoTextRetrieval, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors name what is wrong; other frames than the model's are read by a table of positions that is resized."""
    short = vocabulary(tmp_path, WORDS[:-1])
    places = {"short": short, "nothing": tmp_path / "nothing.csv", "data": data}
    given = [word.format(**places) for word in words.split()]
    command = ["--task", "retrieval", "--model", str(made.save_pretrained(tmp_path / "model")), "--data", str(data)]
    code = main([*command, "--out", str(tmp_path / "out"), "workers=0", "device=cpu", *given])
    error = capsys.readouterr().err
    assert code == (2 if said else 0), error
    assert any(part in error for part in said.split("|")), error


def test_matching_tells_how_far_it_is(
    made: VideoTextRetrieval, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--task", "retrieval", "--model", str(made.save_pretrained(tmp_path / "model")), "--data", str(data)]
    assert main([*command, "--out", str(tmp_path / "out"), "workers=0", "device=cpu"]) == 0
    assert "\nmatching of video 12/12: " in capsys.readouterr().out


def test_a_gpu_where_there_is_none(
    made: VideoTextRetrieval, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda'; allowed here, where PyTorch finds no GPU"):
        evaluate_retrieval(made.save_pretrained(tmp_path / "model"), data, tmp_path / "out", settings(device="cuda"))


def test_numbers_that_are_not_finite_name_the_video(
    made: VideoTextRetrieval, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        made.itm_head.bias.fill_(torch.nan)
    command = ["--task", "retrieval", "--model", str(made.save_pretrained(tmp_path / "model")), "--data", str(data)]
    assert main([*command, "--out", str(tmp_path / "out"), "workers=0", "device=cpu"]) == 1
    assert "00.avi: its scores are not finite in float32" in capsys.readouterr().err


def test_no_video_can_be_read(
    made: VideoTextRetrieval, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.avi").write_bytes(b"no video")
    (tmp_path / "c.csv").write_text("a.avi,a seven moves left\n")
    command = ["--task", "retrieval", "--model", str(made.save_pretrained(tmp_path / "model"))]
    assert main([*command, "--data", str(tmp_path / "c.csv"), "--out", str(tmp_path / "out"), "workers=0", "device=cpu"]) == 1
    assert "none of 1 videos can be read" in capsys.readouterr().err
