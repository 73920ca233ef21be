"""Coloured pictures and videos against literal values: channels, sides and corners cannot be taken for others."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from fused.io.picture import MEAN, STD, centre_crop, height_width, normalise, resize
from fused.io.preprocessing import Preprocessing
from fused.io.video import decode_frames
from harness.fixtures.video import write

RED, GREEN, BLUE, WHITE = (200, 40, 20), (30, 180, 60), (10, 50, 220), (255, 255, 255)


def picture(height: int, width: int) -> Tensor:
    """Red above green on the left, blue above white on the right, uint8 (H, W, 3)."""
    image = torch.empty(height, width, 3, dtype=torch.uint8)
    top, left = height // 2, width // 2
    for rows, columns, colour in (
        (slice(top), slice(left), RED), (slice(top, None), slice(left), GREEN),
        (slice(top), slice(left, None), BLUE), (slice(top, None), slice(left, None), WHITE),
    ):  # fmt: skip
        image[rows, columns] = torch.tensor(colour, dtype=torch.uint8)
    return image


def corners(x: Tensor) -> list[tuple[float, ...]]:
    """The colours at the four corners of (3, H, W): upper left and right, lower left and right."""
    return [tuple(x[:, i, j].tolist()) for i in (0, -1) for j in (0, -1)]


def shares(*colours: tuple[int, int, int]) -> list[tuple[float, ...]]:
    return [pytest.approx(tuple(c / 255 for c in colour), abs=1e-6) for colour in colours]


def test_a_resized_picture_has_its_colours_and_corners() -> None:
    assert corners(resize(picture(40, 60), 20, 30)) == shares(RED, BLUE, GREEN, WHITE)
    assert resize(picture(40, 60), 20, 30).shape == (3, 20, 30)
    white = resize(torch.full((8, 8, 3), 255, dtype=torch.uint8), 4, 4)
    assert torch.equal(white, torch.ones(3, 4, 4)), "255 is 1"


def test_a_smaller_picture_is_antialiased() -> None:
    """Stripes of a pixel become grey, not one of the two."""
    stripes = torch.zeros(32, 32, 3, dtype=torch.uint8)
    stripes[:, ::2] = 255
    assert float((resize(stripes, 8, 8)[:, :, 1:-1] - 0.5).abs().max()) < 0.1


def test_a_colour_is_normalised_by_its_own_numbers() -> None:
    got = normalise(torch.tensor([0.5, 0.25, 0.75])[:, None, None])
    due = [(0.5 - 0.485) / 0.229, (0.25 - 0.456) / 0.224, (0.75 - 0.406) / 0.225]
    assert got.flatten().tolist() == pytest.approx(due, rel=1e-5)
    assert (MEAN, STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_the_middle_of_a_picture_covers_the_size() -> None:
    """Of a wide picture left and right go, of a high one above and below; nothing is stretched."""
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    wide = picture(40, 80)
    wide[:, :20] = wide[:, 60:] = 7
    assert corners(centre_crop(wide, 40, **plain)) == shares(RED, BLUE, GREEN, WHITE)
    high = picture(80, 40)
    high[:20] = high[60:] = 7
    assert corners(centre_crop(high, 40, **plain)) == shares(RED, BLUE, GREEN, WHITE)
    assert centre_crop(wide, (20, 30), **plain).shape == (3, 20, 30)
    assert height_width((2, 3)) == (2, 3) and height_width(5) == (5, 5)


def test_a_coloured_video_is_read_in_its_colours(tmp_path: Path) -> None:
    """Within what H.264 loses; the frames are in their order, and the model's own mean and deviation are used."""
    frames = torch.stack([picture(64, 96)] * 4)
    frames[2:] = frames[2:].flip(2)  # left and right exchanged
    write(tmp_path / "a.mp4", frames)
    read = Preprocessing(2, (64, 96), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0)).read(tmp_path / "a.mp4")
    assert read.shape == (3, 2, 64, 96)
    shares_of = read * torch.tensor([0.5, 0.25, 2.0])[:, None, None, None] + torch.tensor([0.1, 0.2, 0.3])[:, None, None, None]
    for frame, order in ((0, (RED, BLUE, GREEN, WHITE)), (1, (BLUE, RED, WHITE, GREEN))):
        for (i, j), colour in zip(((16, 24), (16, 72), (48, 24), (48, 72)), order, strict=True):
            assert (255 * shares_of[:, frame, i, j]).tolist() == pytest.approx(colour, abs=12), (frame, i, j)


def expected_rgb(y: int, u: int, v: int, kr: float, kb: float, is_full: bool) -> np.ndarray:
    """Return the colour of a pixel by ITU-R BT.601, 709 and 2020: luma weights of red and blue, limited or full range."""
    luma = y / 255 if is_full else (y - 16) / 219
    scale = 255 if is_full else 224
    pb, pr = (u - 128) / scale, (v - 128) / scale
    red, blue = luma + 2 * (1 - kr) * pr, luma + 2 * (1 - kb) * pb
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    return np.clip(np.array([red, green, blue]) * 255, 0, 255)


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize(
    ("matrix", "kr", "kb"), [(1, 0.2126, 0.0722), (5, 0.299, 0.114), (2, 0.299, 0.114), (9, 0.2627, 0.0593)]
)
def test_colours_are_those_that_the_stream_states(matrix: int, kr: float, kb: float, is_full: bool, tmp_path: Path) -> None:
    pixels = [(81, 90, 200), (145, 54, 84), (100, 160, 110), (180, 120, 140)]
    path = tmp_path / "colours.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if is_full else 1
        for i, pixel in enumerate(pixels):
            planes = np.repeat(np.array(pixel, np.uint8)[:, None], 32 * 32, 1).reshape(3, 32, 32)
            frame = av.VideoFrame.from_ndarray(planes, format="yuv444p")
            frame.colorspace, frame.color_range = matrix, 2 if is_full else 1
            frame.pts, frame.time_base = i, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    for number, image in decode_frames(path, lambda n, times: range(4)):
        wanted = expected_rgb(*pixels[number], kr, kb, is_full)
        assert np.abs(image[16, 16].numpy().astype(float) - wanted).max() <= 2, pixels[number]
