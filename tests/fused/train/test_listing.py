"""Folders and lists of videos: separators, headers, columns, labels, encodings, and errors that show the line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainings import class_folders, train
from videos import write_images

from fused.train import ClipFolder
from fused.train.data.listing import Listing, list_videos

List = Callable[..., Listing]


@pytest.fixture
def listed(tmp_path: Path) -> List:
    """Return a function that writes a list into the folder `tmp_path` and reads it."""

    def write_and_read(text: str | bytes, classes: tuple[str, ...] | None = None, **options: Any) -> Listing:
        (tmp_path / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return list_videos(tmp_path / "list.csv", classes, **options)

    return write_and_read


def names(listing: Listing) -> list[str]:
    return [file.name for file in listing.files]


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_csv(listed: List, tmp_path: Path) -> None:
    found = listed('path,label\nsub/z.mp4, run\n"a,b.mp4",swim\n\n/c.any,run\n')
    assert [str(f) for f in found.files] == ["/c.any", f"{tmp_path}/a,b.mp4", f"{tmp_path}/sub/z.mp4"]
    assert found.classes == ("run", "swim") and found.labels == (0, 1, 0)
    assert found.stated_frames == (None,) * 3 and found.notes == ()
    assert listed("a.mp4\nb.mp4\n").labels == (-1, -1)


@pytest.mark.parametrize("header", ["", "path{0}label\n", "Video Name{0}class-id\n", "clip{0}target\n"])
@pytest.mark.parametrize("separator", [" ", "   ", "\t", " \t", ",", " , ", ";", "; "])
def test_separators_and_headers(listed: List, separator: str, header: str) -> None:
    if separator.isspace() and " " in header and "\t" not in separator:
        header = header.replace(" ", "_")
    rows = [("k/c.mp4", 10), ("b.mp4", 0), ("a.avi", 9)]
    found = listed(header.format(separator) + "".join(f"{path}{separator}{label}\n" for path, label in rows))
    assert names(found) == ["a.avi", "b.mp4", "c.mp4"] and found.labels == (9, 0, 10)
    assert found.classes == tuple(map(str, range(11)))


@pytest.mark.parametrize("text", [
    "video,label\n{}", "path,label_id\n{}", "filename;class\n{}", "clip_name\tnumber\n{}", "Datei;Klasse\n{}", "wer was\n{}",
    "what,frame folder\n{}",
])  # fmt: skip
def test_header_turns_no_number_into_a_name(listed: List, text: str) -> None:
    separator = next(mark for mark in ",;\t " if mark in text)
    found = listed(text.format("".join(f"v{i}{separator}{label}\n" for i, label in enumerate((9, 10, 11, 12, 0)))))
    assert names(found) == [f"v{i}" for i in range(5)] and found.labels == (9, 10, 11, 12, 0) and len(found.classes) == 13


def test_headers_before_names(listed: List) -> None:
    for header in ("file,action", "clip_x,act", "v,class name", "label,clip name"):
        rows = [("a.mp4", "run"), ("b.mp4", "sit")]
        lines = [",".join(row[::-1] if header.startswith("label") else row) for row in rows]
        found = listed("\n".join([header, *lines]))
        assert names(found) == ["a.mp4", "b.mp4"] and found.classes == ("run", "sit"), header
    assert "line 1: 'clip_x,act' is taken for a header" in " ".join(listed("clip_x,act\na.mp4,run\nb.mp4,sit").notes)
    assert names(listed("video\nv1\nv2")) == ["v1", "v2"] and names(listed("x\na.mp4\nb.mp4")) == ["a.mp4", "b.mp4"]
    assert listed("v1,action\nv2,drama").classes == ("action", "drama")  # a genre, no header
    joined = listed("path,label\na.mp4,run\npath,label\nb.mp4,sit\n")
    assert joined.classes == ("run", "sit") and "1 further line" in joined.notes[0]


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("my a.mp4 1\nb.mp4 0", ["b.mp4", "my a.mp4"]),
        ("my  a.mp4,1\nmy b.mp4,0", ["my  a.mp4", "my b.mp4"]),
        ('"my a.mp4" 1\nb.mp4 0', ["b.mp4", "my a.mp4"]),
        ("my a.mp4\nmy b.mp4", ["my a.mp4", "my b.mp4"]),
        ('"my, a.mp4"\nb.mp4', ["b.mp4", "my, a.mp4"]),
        ("my v1\t1\nmy v2\t0", ["my v1", "my v2"]),
        ("my v1 20 1\nv2 30 0", ["my v1", "v2"]),
        ('12" tape.mp4,1\nb.mp4,0', ['12" tape.mp4', "b.mp4"]),
        ("a.mp4 x,y\nb.mp4 z", ["a.mp4", "b.mp4"]),
        ('a.mp4 "riding a bike"\nb.mp4 run', ["a.mp4", "b.mp4"]),
        ("a.mp4 b.mp4 1\nc.mp4 0", ["a.mp4 b.mp4", "c.mp4"]),
    ],
)
def test_separators_inside_paths_and_labels(listed: List, text: str, files: list[str]) -> None:
    assert names(listed(text)) == files


@pytest.mark.parametrize(
    ("line", "name", "label", "frames"),
    [
        ("a.mp4 7", "a.mp4", 7, None),
        ("my a.mp4,7", "my a.mp4", 7, None),
        ("a.mp4;7", "a.mp4", 7, None),
        ("a.mp4\t7", "a.mp4", 7, None),
        ("a.mp4,long jump", "a.mp4", 0, None),
        ("a.mp4", "a.mp4", -1, None),
        ("folder 42 7", "folder", 7, 42),
        ("a.mp4,7,142.5", "a.mp4", 7, None),
        ('"a, b.mp4",7', "a, b.mp4", 7, None),
        ("path,label\na.mp4,7", "a.mp4", 7, None),
        ("Video;Class\na.mp4;7", "a.mp4", 7, None),
        ("path,label,split\na.mp4,7,train", "a.mp4", 7, None),
        ("# text\na.mp4,7", "a.mp4", 7, None),
    ],
)
def test_lines_of_the_user_guide(listed: List, line: str, name: str, label: int, frames: int | None) -> None:
    """Each row of the table of lists in fused/README.md, as a list of one line."""
    found = listed(line)
    assert (names(found), found.labels, found.stated_frames) == ([name], (label,), (frames,))


def test_class_names_with_blanks_in_a_comma_list(listed: List) -> None:
    assert listed("a.mp4,long jump\nb.mp4,level 2\nc.mp4,level 1").classes == ("level 1", "level 2", "long jump")
    assert listed("v1,long jump\nv2,high jump").classes == ("high jump", "long jump")
    assert listed('a.mp4,"run, fast"\nb.mp4,sit').classes == ("run, fast", "sit")
    assert listed("v1,level 1\nv2,level 2", separator="comma").classes == ("level 1", "level 2")
    assert listed("v1;x,a 1\nv2;y,b 2", separator=";").classes == ("x,a 1", "y,b 2")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a;b,1\nc;d,2\n", "line 1: 'a;b,1'"),
        ("v1,level 1\nv2,level 2\n", "line 1: 'v1,level 1'"),
        ("\nSmith, J/a.mp4 3\nSmith, K/b.mp4 1\n", "line 2: 'Smith, J/a.mp4 3'"),
        ("v1 run\nv2 long jump\n", "line 2: 'v2 long jump'"),
        ("v;3;12,5\nw;1;2,5\n", "line 1: 'v;3;12,5'"),
    ],
)
def test_ambiguous_separators(listed: List, text: str, line: str) -> None:
    with pytest.raises(ValueError, match="set separator") as caught:
        listed(text)
    assert f"list.csv, {line}" in str(caught.value) and "data.separator" in str(caught.value)


def test_three_columns(listed: List) -> None:
    something = listed("78687 42 0\n8 13 2\n9 7 1\n")  # as upstream's list of SSv2 frame folders
    assert names(something) == ["78687", "8", "9"] and something.labels == (0, 2, 1) and something.stated_frames == (42, 13, 7)
    assert listed("v/a,12,run\nv/b,13,sit").stated_frames == (12, 13)
    films = listed("a.mp4,2,142.5\nb.mp4,0,60\nc.mp4,1,3.2e2")  # as upstream's list of LVU
    assert films.labels == (2, 0, 1) and films.stated_frames == (None,) * 3
    assert listed("a.mp4 2 142.5\nb.mp4 0 60\nc.mp4 1 9").labels == (2, 0, 1)
    assert listed("a.mp4,run,142\nb.mp4,sit,60").classes == ("run", "sit")
    for header, row in (("label;num_frames;video", "{1};{2};{0}"), ("path frames label", "{0} {2} {1}")):
        found = listed("\n".join([header, *(row.format(*cells) for cells in (("a.mp4", 1, 20), ("b.mp4", 0, 30)))]))
        assert names(found) == ["a.mp4", "b.mp4"] and found.labels == (1, 0) and found.stated_frames == (20, 30)
    four = listed("path,label,frames,duration\na.mp4,1,20,2.5\nb.mp4,0,30,1")
    assert four.labels == (1, 0) and four.stated_frames == (20, 30)


def test_a_header_with_path_and_label_beside_other_words(listed: List) -> None:
    """Its columns are taken, whatever the cells of the others look like; the note names those that are not read."""
    rows = [("a.mp4", "1", "train", "34"), ("b.mp4", "0", "val", "27")]
    for header, order in (
        ("path,label,split", (0, 1, 2)), ("path,label,age", (0, 1, 3)), ("label,age,file", (1, 3, 0)),
        ("split,Video,age,class id", (2, 0, 3, 1)), (",age,path,target", (3, 3, 0, 1)),
    ):  # fmt: skip
        for separator in ",\t":
            lines = [header, *(",".join(row[i] for i in order) for row in rows)]
            found = listed("\n".join(lines).replace(",", separator))
            assert names(found) == ["a.mp4", "b.mp4"] and found.labels == (1, 0) and found.stated_frames == (None,) * 2
            assert "is taken for a header; columns that are not read: " in found.notes[0] and "'path'" not in found.notes[0]
    assert listed("\tpath\tlabel\n\n ,; \n0\ta.mp4\t1\n1\tb.mp4\t0").labels == (1, 0)  # as pandas writes it
    assert listed("\tpath\tlabel\n\ta.mp4\t1\n\tb.mp4\t0").labels == (1, 0)  # every line is indented
    assert listed("file,action,split\nv1,run,train\nv2,sit,train").classes == ("run", "sit")
    assert listed("path,label,split\na.mp4,1,7", columns=["path", "frames", "label"]).labels == (7,)


def test_columns_that_cannot_be_told_apart(listed: List) -> None:
    text = "a.mp4,3,12\nb.mp4,0,10"
    with pytest.raises(ValueError, match="line 1: 'a.mp4,3,12' .*set columns"):
        listed(text)
    assert listed(text, columns=["path", "label", "seconds"]).labels == (3, 0)
    assert listed(text, columns=("path", "frames", "label")).labels == (12, 10)
    for text, columns in (("3,a.mp4\n1,b.mp4", ["label", "path"]), ("x,y.mp4\nz,w.mp4", ["path"])):
        with pytest.raises(ValueError, match="has a path behind the first column; set columns"):
            listed(text)
        assert listed(text, columns=columns).files[0].suffix == ".mp4"
    text = ",video,label\n0,a.mp4,3\n1,b.mp4,0"  # as pandas writes it
    assert listed(text).labels == (3, 0) and names(listed(text)) == ["a.mp4", "b.mp4"]
    with pytest.raises(ValueError, match="line 1: '0,a.mp4,3' has a path behind the first column"):
        listed(text.partition("\n")[2])
    assert listed(text, columns=["skip", "path", "skip"]).classes == ()
    assert names(listed("my v1\nmy v2", columns=["path"])) == ["my v1", "my v2"]
    with pytest.raises(ValueError, match="line 1: 'v1 12 run' has a number after a blank"):
        listed("v1 12 run\nv2 13 sit")
    assert listed("v1 12 run\nv2 13 sit", columns=["path", "frames", "label"]).stated_frames == (12, 13)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold videos, path,label"),
        ("path,label\n", "must hold videos, path,label"),
        ("a.mp4,x\nb.mp4,x,y\n", "line 2: 'b.mp4,x,y' has not 2 columns but 3, if comma"),
        ("a.mp4,x\nb.mp4\n", "line 2: 'b.mp4' has not 2 columns but 1"),
        ("a.mp4,1\nb.mp4,0\n\nc.mp4 1\n", "line 4: 'c.mp4 1' has not 2 columns but 1"),
        ("a.mp4,1,2,3\nb.mp4,1,2,3\n", "line 1: 'a.mp4,1,2,3' has 4 columns"),
        (",1\nb.mp4,2\n", "line 1: ',1' has no path"),
        ("path,frames,label\na.mp4,,1\n", "line 2: 'a.mp4,,1' has no frames"),
        ('"a.mp4,1\nb.mp4,0\n', "line 1: .*double quotes"),
        ('"a".mp4,1\nb.mp4,0\n', "line 1: .*double quotes"),
        ("path,frames,label\nv1,12,1\nv2,many,0\n", "line 3: 'v2,many,0' has 'many' for the number of frames"),
        ("path,frames,label\nv1,-2,1\n", "line 2: .*'-2' for the number of frames"),
        ("path,label,seconds\na.mp4,1,1:30\n", "line 2: .*'1:30' for the seconds"),
        ("path,label,seconds\na.mp4,1,-3\n", "line 2: .*'-3' for the seconds"),
        ("dir1 163 1 3 5\ndir2 122 1\n", "line 1: 'dir1 163 1 3 5' has a number"),
        ("a.mp4 riding a bike\nb.mp4 run\n", "line 1: 'a.mp4 riding a bike' has several words behind the name of a file"),
        ("b.mp4 run\na.mp4 long jump\n", "line 2: 'a.mp4 long jump' has several words behind"),
        ("path,class_id,class_name\na.mp4,1,run\n", "line 1: .* names no path, or a column twice; set columns"),
        ("index,label\n0,run\n", "line 1: 'index,label' is a header that names no path"),
        ("file,path,score\na.mp4,1,2\n", "line 1: .*a column twice"),
        ("clip_x,label,age\na.mp4,1,run\nb.mp4,0,sit\n", "line 1: .* names column 2 label, whose cells are those of frames"),
        ('[\n{"video": "a.mp4", "label": 1},\n]\n', "line 2: .*double quotes"),
        ("a.mp4,0\nb.mp4,-1\n", "line 2: .*b.mp4 has the label '-1'; allowed: a class number from 0"),
        ("a.mp4,0.0\nb.mp4,1.0\n", "line 1: .*has the label '0.0'"),
        ("a.mp4,1e3\n", "line 1: .*has the label '1e3'"),
        ("v1,120,3.0\nv2,130,4.0\n", "line 1: .*has the label '3.0'"),
        ("a.mp4,78687123\n", "line 1: .*has the label '78687123'"),
        ("a.mp4,run\nb.mp4,1\nc.mp4,2\n", "line 1 has the label 'run' and line 2 has the label '1'"),
        ("a.mp4,1\nb.mp4,2\nc.mp4,run\n", "line 1 has the label '1' and line 3 has the label 'run'"),
        ("a.mp4,1\nb.mp4,0\n./a.mp4,2\n", "lines 1 and 3: .*a.mp4 has labels '1' and '2'"),
        ("my v1\nmy v2\n", "lines 1 and 2: .*/my has labels 'v1' and 'v2'"),
        ("v1 12 0\nv1 13 0\n", "lines 1 and 2: .*has frame counts 12 and 13"),
        ("https://x.org/a.mp4,1\nb.mp4,0\n", "line 1: .* names a URL"),
        ("a.mp4 1\ns3://x/b.mp4 0\n", "line 2: .* names a URL"),
        ("C:\\v\\a.mp4,1\nb.mp4,0\n", "line 1: .* names a Windows path"),
        ("a.mp4,1\nv\\b.mp4,0\n", "line 2: .* names a Windows path"),
        (b"a.mp4,x\n\xfc.mp4,y\n", "line 2: .*path in another encoding.*UTF-8 text"),
        (b"a.mp4,\xff", "line 1: .*label in another encoding.*UTF-8 text"),
        (b"\0\0\0 ftypisom" + bytes(500), "UTF-8 text.* which is no text"),
    ],
)
def test_invalid_list(listed: List, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listed(text)


@pytest.mark.parametrize("content", ["[]", '[{"id": "7", "label": "run"}]', '{"a": 1}\n{"a": 2}\n'])
def test_json_is_no_list(content: str, tmp_path: Path) -> None:
    for name in ("train.json", "train.JSONL"):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"UTF-8 text, path,label.* got .*{name}, which is named as JSON"):
            list_videos(tmp_path / name, None)


def test_encodings_and_line_ends(listed: List, tmp_path: Path) -> None:
    text = "path,label\nä.mp4,springen\nb.mp4,läuft\n"
    encoded = [text.encode(), text.encode("utf-8-sig"), text.encode("utf-16"), text.replace("\n", "\r\n").encode()]
    encoded += [text.replace("\n", "\r").encode(), ("\ufeffä.mp4,springen\n\ufeffb.mp4,läuft").encode()]
    for content in encoded:
        assert names(listed(content)) == ["b.mp4", "ä.mp4"] and listed(content).classes == ("läuft", "springen")
    name = b"\xfc.mp4"  # the file's name in Latin-1, and the list has the same bytes
    with open(bytes(tmp_path) + b"/" + name, "wb"):
        assert listed(name + b",1\nb.mp4,0").files[1].exists()


def test_comments_and_repeated_lines(listed: List) -> None:
    found = listed('# made by hand\na.mp4,1\n  # b.mp4,1\n"#c.mp4",0\n,,\n')
    assert names(found) == ["#c.mp4", "a.mp4"] and "2 lines of" in found.notes[0] and "comment" in found.notes[0]
    twice = listed("a.mp4,1\nb.mp4,0\nx/../a.mp4,1\n")
    assert names(twice) == ["a.mp4", "b.mp4", "a.mp4"] and "1 line of" in twice.notes[0]
    assert listed("a.mp4,1,\nb.mp4,0,").labels == (1, 0)


def test_class_numbers(listed: List) -> None:
    numbers = listed("a.mp4,10\nb.mp4,2\nc.mp4,007")  # the others are classes too
    assert numbers.labels == (10, 2, 7) and numbers.classes == tuple(map(str, range(11)))
    assert "8 of 11 classes without a video: '0', '1', '3'" in numbers.notes[0]
    validation = listed("d.mp4,2\ne.mp4,09", classes=numbers.classes)
    assert validation.labels == (2, 9) and "9 of 11 classes" in validation.notes[0]
    for label in ("11", "-1", "2.0", "run"):
        with pytest.raises(ValueError, match=f"line 1: .*d.mp4 has the class '{label}'; allowed are '0'"):
            listed(f"d.mp4,{label}\ne.mp4,2", classes=numbers.classes)
    assert listed("a.mp4,-1\na.mp4,0.0\nb.mp4,x", classes=()).labels == (-1,) * 3  # pretraining ignores labels
    assert listed("a.mp4,007\nb.mp4,8", classes=("007", "8")).labels == (0, 1)
    assert listed("a.mp4,1\nb.mp4,run", classes=("run", "1")).labels == (1, 0)
    assert "differ by case" in listed("a.mp4,Run\nb.mp4,run").notes[0]
    assert "accents" in listed("a.mp4,caf\u00e9\nb.mp4,cafe\u0301").notes[0]


def test_prefix(listed: List, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "videos/a.mp4", "elsewhere/x")
    monkeypatch.chdir(tmp_path)
    for prefix in ("videos", "videos/", f"{tmp_path}/videos"):
        found = listed("a.mp4 1\n/data/b.mp4 0", prefix=prefix)
        assert [str(file) for file in found.files] == ["/data/b.mp4", str(Path(prefix, "a.mp4"))]
    with pytest.raises(ValueError, match="prefix is 'nowhere', and there is no such folder"):
        listed("a.mp4 1", prefix="nowhere")


def test_options_out_of_range(listed: List, tmp_path: Path) -> None:
    for options, message in [
        ({"separator": "|"}, r"separator is '\|'; allowed: one of 'tab', 'comma'"),
        ({"separator": ""}, "separator is ''"),
        ({"columns": ["label"]}, r"columns are \['label'\]; allowed: a sequence of 'path'"),
        ({"columns": "path"}, "columns are 'path'"),
        ({"columns": ["path", "path"]}, "each but 'skip' at most once"),
        ({"columns": ["path", "score"]}, "columns are"),
        ({"separator": "tab"}, "line 1: 'a.mp4,1' has not 2 columns but 1, if tab"),
        ({"columns": ["path", "frames", "label"]}, "line 1: 'a.mp4,1' has not 3 columns but 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            listed("a.mp4,1\nb.mp4,0", **options)
    for option in ({"separator": ","}, {"prefix": str(tmp_path)}, {"columns": ["path"]}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is .* is a folder; allowed for a list"):
            list_videos(tmp_path, None, **option)


def test_folders_of_frames(tmp_path: Path) -> None:
    """A folder that holds images and no videos is one video; other images are left out."""
    root = touch(
        tmp_path, "run/v1/img_00001.jpg", "run/v1/img_00002.jpg", "run/v2/0.PNG", "run/deep/v3/x.webp", "sit/v4/1.bmp",
        "sit/b.mp4", "sit/thumbnail.jpg", "sit/empty/notes.txt", "sit/v5/.hidden.jpg", "cover.jpeg",
    )  # fmt: skip
    found = list_videos(root, None)
    assert [str(f.relative_to(root)) for f in found.files] == ["run/deep/v3", "run/v1", "run/v2", "sit/b.mp4", "sit/v4"]
    others = f"{root}: files that are no videos by their endings are left out: .txt (1)"
    assert found.labels == (0, 0, 0, 1, 1) and found.classes == ("run", "sit") and found.notes == (others,)
    touch(root, "run/poster.jpg", "run/v1/.trash/0.jpg")
    assert len(list_videos(root, None).files) == 5
    images = f"{root / 'run'} holds images beside folders of videos; the images are left out"
    assert list_videos(root, None).notes == (images, others)


def test_endings_of_video_files(tmp_path: Path) -> None:
    names_of_videos = ["a.NUT", "b.m2v", "c.3g2", "d.ogm", "e.y4m", "f.hevc", "g.MP4", "h.Mkv", "i.rmvb", "j.mp4.gif"]
    root = touch(tmp_path, *(f"run/{name}" for name in names_of_videos), "run/k.mp4.part", "run/l", "run/m", "run/.n.part")
    found = list_videos(root, None)
    assert names(found) == names_of_videos
    assert "left out: without an ending (2), .part (1)" in found.notes[0]


def test_folders_of_frames_without_classes(tmp_path: Path) -> None:
    root = touch(tmp_path / "flat", "v1/1.jpg", "v2/1.jpg", "c.mp4")
    found = list_videos(root, None)
    assert names(found) == ["c.mp4", "v1", "v2"] and found.labels == (-1,) * 3 and found.classes == ()
    with pytest.raises(ValueError, match="must hold videos, .*folders of images; there is none in"):
        list_videos(root / "v1", None)
    touch(root, "run/v3/1.jpg")
    with pytest.raises(ValueError, match="c.mp4 has none, and others have one"):
        list_videos(root, None)
    assert ClipFolder(root, 2, 8, train=True, classes=()).labels == (-1,) * 4


def test_links(tmp_path: Path) -> None:
    """Links to videos and to folders of them are followed; those that lead nowhere, or to themselves, are files."""
    root = touch(tmp_path / "videos", "run/a.mp4", "sit/b.mp4")
    touch(tmp_path / "elsewhere", "c.mp4", "d.mp4")
    for name, target in {
        "run/c.mp4": tmp_path / "elsewhere/c.mp4", "sit/more": tmp_path / "elsewhere", "run/round.mp4": "round.mp4",
        "run/gone.mp4": "nowhere.mp4", "run/round": "round", "sit/one": "two", "sit/two": "one", "walk": "walk",
    }.items():  # fmt: skip
        (root / name).symlink_to(target)
    found = list_videos(root, None)
    assert names(found) == ["a.mp4", "c.mp4", "gone.mp4", "round.mp4", "b.mp4", "c.mp4", "d.mp4"]
    assert found.classes == ("run", "sit") and "without an ending (4)" in found.notes[0]


def test_class_folders(tmp_path: Path) -> None:
    root = touch(tmp_path, "Run/a.mp4", "run/b.mp4", "walk/readme.txt", "sit/c/d/e.mp4")
    (root / "sit/c/up").symlink_to(root / "sit")  # a circle
    found = list_videos(root, None)
    assert names(found) == ["a.mp4", "b.mp4", "e.mp4"] and found.classes == ("Run", "run", "sit")
    assert "left out: .txt (1)" in found.notes[0]
    assert "class folders without a video: 'walk'" in found.notes[1] and "differ by case" in found.notes[2]
    assert "2 of 5 classes without a video: 'x', 'y'" in list_videos(root, ["x", "sit", "Run", "run", "y"]).notes[2]


def test_class_folder_in_another_encoding(tmp_path: Path) -> None:
    """It is said before the training, whose model could not be written; names of files may be any bytes."""
    root = touch(tmp_path, "run/\udce9.mp4", "sit/b.mp4")
    assert list_videos(root, None).classes == ("run", "sit")
    touch(root, "laufen \udcfc/a.mp4")
    with pytest.raises(ValueError, match="has the class 'laufen .udcfc', a name in another encoding; .* rename the folder"):
        list_videos(root, None)
    assert list_videos(root, ()).labels == (-1,) * 3  # pretraining ignores classes


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["10", "0", "2"], tuple(map(str, range(11)))),
        (["02", "10", "01"], ("01", "02", "10")),
        (["20240102", "20231231"], ("20231231", "20240102")),
        (["1", "b"], ("1", "b")),
    ],
)
def test_class_folders_named_by_numbers(tmp_path: Path, folders: list[str], classes: tuple[str, ...]) -> None:
    found = list_videos(touch(tmp_path, *(f"{name}/a.mp4" for name in folders)), None)
    assert found.classes == classes and [classes[label] for label in found.labels] == [f.parent.name for f in found.files]


def test_a_training_on_lists_says_its_notes(tmp_path: Path) -> None:
    videos = class_folders(tmp_path / "videos", 2)
    files = sorted(str(file.relative_to(videos)) for file in videos.rglob("*.*"))
    (tmp_path / "train.txt").write_text("".join(f"{file};{3 * i % 6}\n" for i, file in enumerate(files)))
    (tmp_path / "val.txt").write_text(f"# one\n{files[0]} 3\n")
    words = ["task=finetune", f"out={tmp_path / 'run'}", "steps=1", f"data.train={tmp_path / 'train.txt'}", "data.size=32"]
    words += [f"data.val={tmp_path / 'val.txt'}", f"data.prefix={videos}", "batch_size=2", "data.frames=2", "model.depth=1"]
    code, output = train([*words, "--dry-run"], folder=tmp_path)
    assert code == 0 and "4 videos in 4 classes" in output, output
    assert f"data.train: {tmp_path / 'train.txt'}: 2 of 4 classes without a video: '1', '2'" in output
    assert "data.val: 1 line of" in output and "3 of 4 classes without a video: '0', '1', '2'" in output
    code, output = train([*words, "--dry-run", "data.separator=comma"], folder=tmp_path)
    assert code == 2 and "data.train: " in output and "line 1" in output and "if comma separates them" in output


@pytest.mark.parametrize(("listed_part", "other"), [("train", "val"), ("val", "train")])
def test_options_of_lists_concern_lists(listed_part: str, other: str, tmp_path: Path) -> None:
    """A folder beside a list does without them; without any list they are refused."""
    videos = class_folders(tmp_path / "videos", 2)
    files = sorted(str(file.relative_to(videos)) for file in videos.rglob("*.*"))
    (tmp_path / "list.txt").write_text("".join(f"{Path(file).parent};{file}\n" for file in files))
    words = ["task=finetune", f"out={tmp_path / 'run'}", "steps=1", "data.size=32", "batch_size=2", "data.frames=2"]
    words += ["--dry-run", f"data.prefix={videos}", "data.separator=semicolon", "data.columns=[label,path]", "model.depth=1"]
    code, output = train([*words, f"data.{listed_part}={tmp_path / 'list.txt'}", f"data.{other}={videos}"], folder=tmp_path)
    assert code == 0 and "4 videos in 2 classes" in output, output
    code, output = train([*words, f"data.train={videos}", f"data.val={videos}"], folder=tmp_path)
    assert code == 2 and f"data.train: separator is 'semicolon', but {videos} is a folder" in output, output


def test_validation_has_options_of_its_own(tmp_path: Path) -> None:
    """Two lists that differ in separator, prefix and columns; frame folders that differ in their images' names."""
    videos = class_folders(tmp_path / "videos", 2)
    files = sorted(str(file.relative_to(videos)) for file in videos.rglob("*.*"))
    (tmp_path / "train.txt").write_text("".join(f"{file};{i % 2}\n" for i, file in enumerate(files)))
    for i in range(2):
        write_images(tmp_path / "frames" / f"v, {i}", ["img_1.png", "img_2.png", "flow_1.png", "flow_2.png"])
    (tmp_path / "val.txt").write_text("1\tv, 1\n0\tv, 0\n")
    words = ["task=finetune", f"out={tmp_path / 'run'}", "steps=1", "data.size=32", "batch_size=2", "data.frames=2"]
    words += ["device=cpu", "--dry-run", "model.depth=1", f"data.train={tmp_path / 'train.txt'}", f"data.prefix={videos}"]
    words += ["data.separator=semicolon", "data.columns=[path,label]"]
    val = [f"data.val={tmp_path / 'val.txt'}", f"data.val_prefix={tmp_path / 'frames'}", "data.val_separator=tab"]
    val += ["data.val_columns=[label,path]", "data.val_frame_pattern=flow_*"]
    code, output = train([*words, *val], folder=tmp_path)
    assert code == 0 and "4 videos in 2 classes" in output, output
    assert "data.train: " not in output and "data.val: " not in output, output
    for word, wanted in (
        ("data.val_prefix=null", f"data.val: none of 2 videos that were tried gives a clip: {videos}/v, 0: no such file"),
        ("data.val_separator=null", "data.val: "),
        ("data.val_frame_pattern=null", "it holds images of 2 kinds"),
        ("data.val_columns=[path,path]", "data.val_columns is ('path', 'path'); allowed: a list of"),
        (f"data.val={videos}", f"data.val: separator is 'tab', but {videos} is a folder"),
        ("data.val=null", "data.val_separator is 'tab'; allowed: null without data.val"),
    ):
        code, output = train([*words, *val, word], folder=tmp_path)
        assert code == 2 and wanted in output.splitlines()[-1], output
