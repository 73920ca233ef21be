"""Lists of conversations: what is read, what is refused, and how entries become rows of tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("av")

from bimba_folders import model as bimba  # noqa: E402
from byte_tokenizers import byte_tokenizer  # noqa: E402
from language_lists import SPECIAL, talk, write_list  # noqa: E402
from videos import write_images, write_video  # noqa: E402

from fused.io.repeated_frames import RepeatedFrames, even_places  # noqa: E402
from fused.io.video import VideoError  # noqa: E402
from fused.models.bimba.model import VIDEO_TOKEN  # noqa: E402
from fused.models.conversation.turns import Piece, Turn, chat_text, pieces_of, tokenize  # noqa: E402
from fused.train.data.batches import batches  # noqa: E402
from fused.train.language.entries import read_entries  # noqa: E402
from fused.train.language.samples import BimbaReader, ConversationData, Sample, SampleTooLong, VambaReader, pack  # noqa: E402

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a video, an image and a folder of images."""
    path = tmp_path_factory.mktemp("list")
    write_video(path / "a.avi", frames=6, width=48, height=32)
    write_images(path / "frames", ["1.png", "2.png"])
    (path / "frames" / "1.png").copy(path / "b.png") if hasattr(Path, "copy") else (path / "b.png").write_bytes(
        (path / "frames" / "1.png").read_bytes()
    )
    return path


def reader(length: int = 10_000, frames: int = 4, longest: int | None = 56) -> VambaReader:
    return VambaReader(byte_tokenizer(SPECIAL), frames, longest, length)


def entries(folder: Path, *given: Any, name: str = "list.json") -> list[Any]:
    return read_entries(write_list(folder / name, list(given)))


def test_lists_in_json_and_in_lines_with_the_roles_of_both_habits(folder: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "<video>\nWho?"},
        {"role": "assistant", "content": "A rabbit."},
    ]  # fmt: skip
    given = [talk("<video>\nWho?", "A rabbit.", video="a.avi"), {"messages": messages, "video": "frames"}, talk("Hi", "Ho")]
    (folder / "list.jsonl").write_text("\n\n".join(map(json.dumps, given)) + "\n")
    found = entries(folder, *given)
    assert [e._replace(name="") for e in found] == [e._replace(name="") for e in read_entries(folder / "list.jsonl")]
    assert [e.name for e in found] == ["list.json#0", "list.json#1", "list.json#2"]
    assert found[0].turns == (Turn("user", "<video>Who?"), Turn("assistant", "A rabbit."))
    assert found[1].turns[0] == Turn("system", "Be brief.") and found[1].file == folder / "frames"
    assert found[2].file is None
    (elsewhere := folder / "lists").mkdir()
    assert read_entries(write_list(elsewhere / "l.json", given[:1]), prefix=folder)[0].file == folder / "a.avi"


def test_the_tag_of_an_image_stands_for_a_video_too_and_anywhere_in_the_question(folder: Path) -> None:
    found = entries(
        folder, talk("<image>\nWho?", "A", video="a.avi"), talk("Who?\n<video>", "A", video="a.avi"),
        talk("<image>\nWho?", "<video> is a word here", image="b.png"),
    )  # fmt: skip
    assert [e.turns[0].text for e in found] == ["<video>Who?", "Who?\n<video>", "<video>Who?"]
    assert [e.is_image for e in found] == [False, False, True]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (talk("<video>\nQ", "A", video="none.mp4"), "video is 'none.mp4', and there is no"),
        (talk("<video>\nQ", "A"), "it has the tag <video> and no file"),
        (talk("<image>\nQ", "A"), "it has the tag <image> and no file"),
        (talk("Q", "A", video="a.avi"), "it has the video 'a.avi' and no tag"),
        (talk("Q", "A", image="b.png"), "it has the image 'b.png' and no tag"),
        (talk("<video>\nQ", "A", image="b.png"), "it has the tag <video> and the image"),
        (talk("<video><video>Q", "A", video="a.avi"), "it has 2 tags"),
        (talk("<image>Q", "A", video="a.avi", image="b.png"), "it has a video, 'a.avi', and an image"),
        (talk("<image>Q", "A", image=["b.png", "b.png"]), "image is ['b.png', 'b.png']; allowed: the path of one file"),
        (talk("<image>Q", "A", image="x" * 300), "xx', and there is no"),
        (talk("<image>Q", "A", image="a\0b"), "image is 'a\\x00b', and there is no"),
        (talk("Q", "a\ud83d"), "turn 1 holds half of a letter of UTF-16, 'a\\ud83d'"),
        (talk("Q", " \n"), "turn 1 is an empty answer"),
        (talk("", "A"), "turn 0 is an empty text"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "turn 0 is from 'tool'; allowed: human, user, gpt"),
        ({"conversations": [{"value": "x"}]}, "turn 0 is from None"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 0 has the value 3; allowed: a text"),
        ({"conversations": [{"from": "human", "value": "Q"}]}, "the last turn is no answer"),
        ({"conversations": [{"from": "gpt", "value": "A"}]}, "turn 0 is of assistant; allowed: questions and answers in turn"),
        ({"conversations": []}, "conversations is []"),
        ({"id": 3}, "entry 1 (id 3): conversations is None"),
        (["Q", "A"], "it is a list; allowed: an object"),
    ],
)
def test_wrong_entries_are_counted_and_said(folder: Path, given: Any, said: str) -> None:
    with pytest.raises(ValueError) as found:
        entries(folder, talk("Q", "A"), given)
    assert "1 of 2 entries are wrong: entry 1" in str(found.value) and said in str(found.value)


def test_lists_as_other_programs_write_them(folder: Path) -> None:
    """A mark in front, ends of lines of Windows, and such as only a text holds; the file in a list of one."""
    given = [talk("<video>\nWho\u2028is\x85it?", "A", video=["a.avi"]), talk("Q", "\U0001f407")]
    lines = "\r\n".join(json.dumps(entry, ensure_ascii=False) for entry in given)
    for text in (lines, json.dumps(given), json.dumps(given, ensure_ascii=False, indent=1)):
        for mark in (b"", b"\xef\xbb\xbf"):
            (folder / "other.json").write_bytes(mark + text.encode())
            first, second = read_entries(folder / "other.json")
            assert first.turns[0].text == "<video>Who\u2028is\x85it?" and first.file == folder / "a.avi"
            assert second.turns[1].text == "\U0001f407"


def test_a_later_tag_a_later_system_turn_and_many_wrong_entries(folder: Path) -> None:
    later = talk("Q", "A", video="a.avi")
    later["conversations"] += [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "A"}]
    with pytest.raises(ValueError, match="its tag <video> stands in a later turn"):
        entries(folder, later)
    system = talk("Q", "A")
    system["conversations"].insert(1, {"from": "system", "value": "S"})
    with pytest.raises(ValueError, match="a system turn is not the first"):
        entries(folder, system)
    with pytest.raises(ValueError, match=r"7 of 7 entries are wrong.*; and 2 more"):
        entries(folder, *[talk("Q", "")] * 7)


def test_files_that_are_no_lists(folder: Path) -> None:
    for text, said in (("", "is empty"), ("[]", "is empty"), ("[1", "is no JSON"), ('{"a": 1}\n{', "line 2 is no JSON")):
        (folder / "wrong.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_entries(folder / "wrong.json")
    for text in ("[" * 100_000, '{"a": ' * 100_000):
        (folder / "wrong.json").write_text(text)
        with pytest.raises(ValueError, match="is no JSON: maximum recursion depth"):
            read_entries(folder / "wrong.json")
    (folder / "wrong.json").write_bytes(b"[\xff]")
    with pytest.raises(ValueError, match="is no JSON"):
        read_entries(folder / "wrong.json")
    with pytest.raises(FileNotFoundError):
        read_entries(folder / "missing.json")


def test_answers_alone_are_learnt_with_the_token_that_ends_them() -> None:
    fast = byte_tokenizer(SPECIAL)
    turns = [Turn("user", "One?"), Turn("assistant", "yes"), Turn("user", "Two?"), Turn("assistant", "no")]
    tokens, labels = tokenize(fast, pieces_of(fast, turns))
    assert fast.decode(tokens) == chat_text(fast, turns)
    assert fast.decode(tokens).startswith(SYSTEM + "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n")
    learnt = [fast.decode([t for t, label in zip(tokens, labels, strict=True) if label != -100])]
    assert learnt == ["yes<|im_end|>no<|im_end|>"]
    assert all(label in (-100, token) for token, label in zip(tokens, labels, strict=True))


def test_the_chat_template_of_the_tokenizer_is_taken_where_it_has_one() -> None:
    fast = byte_tokenizer(SPECIAL)
    fast.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = [Turn("user", "One?"), Turn("assistant", "yes")]
    tokens, labels = tokenize(fast, pieces_of(fast, turns))
    assert fast.decode(tokens) == "[user]One?<|im_end|>[assistant]yes<|im_end|>"
    assert fast.decode([label for label in labels if label != -100]) == "yes<|im_end|>"
    fast.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="changes earlier turns"):
        pieces_of(fast, [*turns, *turns])


def test_samples_of_a_vamba_hold_what_a_question_in_a_chat_holds(folder: Path) -> None:
    first, image, plain = entries(
        folder, talk("<video>\nWho?", "A", video="a.avi"), talk("<image>\nWho?", "A", image="b.png"), talk("Hi", "Ho")
    )
    read = reader()
    sample = read.read(first)
    text = read.tokenizer.decode(sample.tokens.tolist())
    user = "<|im_start|>user\n<|vision_start|><|vision_end|>Who?<|im_end|>\n"
    assert text == f"{SYSTEM}{user}<|im_start|>assistant\nA<|im_end|>\n"
    assert read.tokenizer.decode(sample.tokens[: sample.place].tolist()).endswith("<|vision_start|>")
    assert sample.frames.shape == (4, 3, 252, 252) and sample.frames.dtype == torch.uint8  # sides are raised to 256 pixels
    assert sample.video_tokens == 2 * 9 * 9 and sample.length == len(sample.tokens) + 162
    still = read.read(image)
    assert len(still.frames) == 2 and torch.equal(still.frames[0], still.frames[1])
    assert len(read.read(plain).frames) == 0 and read.read(plain).video_tokens == 0


@pytest.mark.parametrize("times", [True, False])
def test_samples_of_a_bimba_hold_what_a_question_in_a_chat_holds(folder: Path, times: bool) -> None:
    """Tokens of the prompt, frames, and the number of tokens that the model makes of them; a short video repeats frames."""
    fast = byte_tokenizer(SPECIAL)
    net = bimba(vocab_size=len(fast))
    [entry] = entries(folder, talk("<video>\nWho?", "A", video="a.avi"))
    read = BimbaReader(fast, 8, 10_000, times, net.config, net.image_size, 14)
    sample = read.read(entry)
    found = RepeatedFrames(folder / "a.avi", 8, even_places)
    images = torch.stack([image for image, count in found for _ in range(count)])
    assert len(set(found.places)) == 6 and torch.equal(sample.frames, net.prepare_frames(images))
    told = (found.seconds, found.duration) if times else (None, None)
    prompt = net.tokenize(fast, "Who?", *told)[0]
    assert torch.equal(sample.tokens[: len(prompt)], prompt) and sample.tokens[sample.place] == VIDEO_TOKEN
    assert fast.decode(sample.tokens[len(prompt) :].tolist()) == "A<|im_end|>\n"
    with torch.no_grad():
        assert sample.video_tokens == len(net.compress(net.encode_frames(sample.frames)))
    with pytest.raises(SampleTooLong, match=r"\(0 of text, 96 of video\) are more than language.length 90"):
        BimbaReader(fast, 8, 90, times, net.config, net.image_size, 14).read(entry)
    for newline in ("frame", "no_token"):
        other = {**net.config, "mm_newline_position": newline, "temporal_pooling": 2, "mm_spatial_pool_mode": "average"}
        model = bimba(**other)
        with torch.no_grad():
            count = len(model.compress(model.encode_frames(sample.frames)))
        assert BimbaReader(fast, 8, 10_000, times, other, net.image_size, 14).read(entry).video_tokens == count


def test_too_long_samples_are_said_before_their_video_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, plain = entries(folder, talk("<video>\nWho?", "A", video="a.avi"), talk("Hi", "Ho" * 200))
    with pytest.raises(SampleTooLong, match=r"list.json#1: \d+ tokens \(\d+ of text, 0 of video\) are more than .*length 200"):
        reader(200).read(plain)
    monkeypatch.setattr("fused.train.language.samples.prepare_frame", lambda *a: pytest.fail("a frame was prepared"))
    with pytest.raises(SampleTooLong, match=r"a.avi: \d+ tokens \(\d+ of text, 162 of video\) are more than .*length 200"):
        reader(200).read(first)


def test_rows_hold_what_fits_in_the_order_of_the_samples() -> None:
    def sample(length: int) -> Sample:
        return Sample(torch.zeros(length), torch.zeros(length), torch.empty(0), 0, 0)

    rows = pack([sample(n) for n in (5, 4, 3, 2, 6, 1)], 8)
    assert [[s.length for s in row] for row in rows] == [[5, 3], [4, 2, 1], [6]]
    assert pack([], 8) == []


def test_a_bad_sample_is_replaced_and_reported_and_workers_change_nothing(folder: Path) -> None:
    (folder / "broken.avi").write_bytes(b"no video")
    given = [talk(f"Q{i}", f"A{i}") for i in range(6)] + [talk("<video>\nQ", "A", video="broken.avi"), talk("Q", "A" * 900)]
    data = ConversationData(write_list(folder / "bad.json", given), None, reader(length=800))
    found = [list(batches(data, 4, epoch=0, seed=1, workers=workers)) for workers in (0, 2)]
    for one, other in zip(*found, strict=True):
        read, again = ([[s.tokens.tolist() for s in row] for row in batch.rows] for batch in (one, other))
        assert read == again
    bad = {file.sentence for batch in found[0] for file in batch.bad_files}
    assert len(bad) == 2 and any("broken.avi" in s for s in bad) and any("more than language.length 800" in s for s in bad)
    assert all(sum(map(len, batch.rows)) == 4 for batch in found[0])
    with pytest.raises(ValueError, match="none of 1 entries that were tried gives a sample"):
        ConversationData(write_list(folder / "one.json", given[-1:]), None, reader(length=800)).first_look()
    notes = ConversationData(write_list(folder / "two.json", [given[-1], given[0]]), None, reader(length=800)).first_look()
    assert len(notes) == 1 and "more than language.length" in notes[0]
    with pytest.raises(VideoError, match="broken.avi"):
        data.sample(6, 0)


def test_a_sample_of_exactly_the_length_is_read(folder: Path) -> None:
    [first] = entries(folder, talk("<video>\nWho?", "A", video="a.avi"))
    length = reader().read(first).length
    assert reader(length).read(first).length == length
    with pytest.raises(SampleTooLong):
        reader(length - 1).read(first)


def test_video_tokens_need_room_in_a_row_too() -> None:
    def sample(words: int, video: int) -> Sample:
        return Sample(torch.zeros(words), torch.zeros(words), torch.empty(0), video, 0)

    rows = pack([sample(2, 5), sample(2, 0), sample(1, 0), sample(1, 6)], 8)
    assert [[s.length for s in row] for row in rows] == [[7, 1], [2], [7]]


def test_the_first_look_is_spread_over_the_list(folder: Path) -> None:
    """A list begins with entries of one kind where it was joined from several."""
    given = [talk("Q", "A" * 900)] * 39
    data = ConversationData(write_list(folder / "spread.json", given), None, reader(length=800))
    with pytest.raises(ValueError, match="none of 13 entries that were tried"):
        data.first_look()


def test_a_template_that_changes_an_answer_once_another_follows_is_refused() -> None:
    fast = byte_tokenizer(SPECIAL)
    fast.chat_template = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    turns = [Turn("user", "One?"), Turn("assistant", "yes"), Turn("user", "Two?"), Turn("assistant", "no")]
    assert len(pieces_of(fast, turns[:2])) == 2
    with pytest.raises(ValueError, match="changes earlier turns"):
        pieces_of(fast, turns)


def test_the_video_has_one_place_though_an_answer_names_its_word(folder: Path) -> None:
    fast = byte_tokenizer(SPECIAL)
    net = bimba(vocab_size=len(fast))
    [entry] = entries(folder, talk("<video>\nWho?", "It says <video>.", video="a.avi"))
    sample = BimbaReader(fast, 4, 10_000, False, net.config, net.image_size, 14).read(entry)
    assert (sample.tokens == VIDEO_TOKEN).sum() == 1
    assert fast.decode([t for t in sample.labels.tolist() if t >= 0]) == "It says <video>.<|im_end|>"


def test_pieces_get_no_tokens_of_the_tokenizers_own() -> None:
    """Many tokenizers put a token in front of what they are given, which is wanted nowhere within a conversation."""

    def tokenizer(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + list(text.encode())}

    tokens, _ = tokenize(tokenizer, [Piece("ab", False), Piece("c", True)])
    assert tokens == [97, 98, 99]
