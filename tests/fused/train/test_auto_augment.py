"""RandAugment and AutoAugment by upstream's rule: what is drawn, what operations do, and that a clip's frames share it."""

import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from videos import write_images, write_video

from fused.io.picture import normalise
from fused.train import ClipFolder
from fused.train.config_file import read_config
from fused.train.data.augment import MEAN_BYTES, Crop
from fused.train.data.auto_augment import GREY, RAND, AugmentPolicy, Layer, Operation, apply_operations

UPSTREAM = "rand-m7-n4-mstd0.5-inc1"
SHAPES = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}
DRAWS = 4000


def drawn(name: str, level: float, increasing: bool) -> set[float]:
    """Return the arguments that an operation has at a level."""
    rng, policy = random.Random(0), AugmentPolicy(((Layer(name, 1.0, float(level)),),), 1, increasing)
    return {round(operation.argument, 9) for _ in range(20) for operation in policy.draw(rng)}


def frame() -> torch.Tensor:
    """Return an image (12, 20, 3) of random bytes."""
    return torch.randint(0, 256, (12, 20, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def after(name: str, argument: float, image: torch.Tensor | None = None) -> torch.Tensor:
    return apply_operations(frame() if image is None else image, [Operation(name, float(argument))])


@pytest.mark.parametrize(
    ("name", "plain", "increasing"),
    [
        ("Rotate", {21.0, -21.0}, {21.0, -21.0}), ("ShearX", {0.21, -0.21}, {0.21, -0.21}),
        ("TranslateY", {0.315, -0.315}, {0.315, -0.315}), ("Posterize", {2.0}, {2.0}), ("Solarize", {179.0}, {77.0}),
        ("SolarizeAdd", {77.0}, {77.0}), ("Color", {1.36}, {1.63, 0.37}), ("Sharpness", {1.36}, {1.63, 0.37}),
        ("Equalize", {0.0}, {0.0}),
    ],
)  # fmt: skip
def test_arguments_at_level_7(name: str, plain: set[float], increasing: set[float]) -> None:
    """By timm's formulas: 7/10 of 30 degrees, 0.3, 0.45, 4 bits, 256, 110; 0.1 + 0.7 * 1.8, and 1 +- 0.7 * 0.9."""
    assert drawn(name, 7, False) == plain and drawn(name, 7, True) == increasing


def test_levels_at_the_ends() -> None:
    assert drawn("Posterize", 0, True) == {4.0} and drawn("Posterize", 10, True) == {0.0} == drawn("Posterize", 0, False)
    assert drawn("Solarize", 0, True) == {256.0} and drawn("Brightness", 0, True) == {1.0}


def test_what_upstream_draws() -> None:
    """Four of the 15 operations with replacement, each applied in half of the cases, at levels around 7, at most 10."""
    rng, policy = random.Random(3), AugmentPolicy.parse(UPSTREAM)
    clips = [policy.draw(rng) for _ in range(DRAWS)]
    counts = Counter(operation.name for clip in clips for operation in clip)
    assert set(counts) == set(RAND) and max(map(len, clips)) == 4
    deviation = 5 * (DRAWS * 4 / 30) ** 0.5
    assert all(abs(count - DRAWS * 4 / 30) < deviation for count in counts.values())
    angles = [abs(operation.argument) / 3 for clip in clips for operation in clip if operation.name == "Rotate"]
    mean = sum(angles) / len(angles)
    spread = (sum((a - mean) ** 2 for a in angles) / len(angles)) ** 0.5
    assert abs(mean - 7) < 5 * 0.5 / len(angles) ** 0.5 and abs(spread - 0.5) < 0.1
    positive = sum(o.argument > 0 for clip in clips for o in clip if o.name == "Rotate")
    assert abs(positive - len(angles) / 2) < 5 * (len(angles) / 4) ** 0.5
    strong = AugmentPolicy.parse("rand-m10-n2-mstd3-inc1")
    assert max(abs(o.argument) for _ in range(400) for o in strong.draw(rng) if o.name == "Rotate") == 30


def test_the_policy_v0() -> None:
    """One of 25 pairs, each operation with its own probability and level."""
    policy, rng = AugmentPolicy.parse("v0"), random.Random(0)
    assert len(policy.choices) == 25 and all(len(pair) == 2 for pair in policy.choices) and policy.draws == 1
    assert policy.choices[15] == (Layer("Rotate", 1.0, 7.0), Layer("TranslateY", 0.8, 9.0))
    only = AugmentPolicy(policy.choices[15:16], 1, False)
    lengths = Counter(len(only.draw(rng)) for _ in range(1000))
    assert set(lengths) == {1, 2} and abs(lengths[2] - 800) < 5 * (1000 * 0.8 * 0.2) ** 0.5


def test_colours() -> None:
    image = frame()
    assert torch.equal(after("Invert", 0), 255 - image)
    assert torch.equal(after("Solarize", 100), torch.where(image < 100, image, 255 - image))
    assert torch.equal(after("Solarize", 256), image)
    assert torch.equal(after("Posterize", 2), image & 0b11000000) and (after("Posterize", 0) == 0).all()
    wide = image.int()
    assert torch.equal(after("SolarizeAdd", 110).int(), torch.where(wide < 128, (wide + 110).clamp(max=255), wide))
    assert (after("Brightness", 0.5).int() - wide // 2).abs().max() <= 1 and torch.equal(after("Color", 1.0), image)
    grey = after("Color", 0.0)
    assert torch.equal(grey[..., 0], grey[..., 1]) and torch.equal(grey[..., 1], grey[..., 2])
    narrow = (image // 2 + 30).contiguous()
    assert after("AutoContrast", 0, narrow).amin() == 0 and after("AutoContrast", 0, narrow).amax() == 255
    tall = narrow.repeat(8, 8, 1)  # of as many pixels that they can be spread over 256 values
    assert after("Equalize", 0, tall).float().std() > 1.5 * tall.float().std()


def test_shapes() -> None:
    """Pixels move by shares of the frame, and what becomes free is grey."""
    image = frame()
    moved = after("TranslateX", 0.25)
    assert torch.equal(moved[:, :15], image[:, 5:]) and (moved[:, 15:] == torch.tensor(GREY)).all()
    moved = after("TranslateY", -0.5)
    assert torch.equal(moved[6:], image[:6]) and (moved[:6] == torch.tensor(GREY)).all()
    for name, argument in (("ShearX", 0.3), ("ShearY", -0.3), ("Rotate", 30.0)):
        turned = after(name, argument)
        assert not torch.equal(turned, image) and (turned == torch.tensor(GREY)).all(-1).any()
    assert torch.equal(after("Rotate", 0.0), image) and torch.equal(after("ShearX", 0.0), image)


@pytest.mark.parametrize(
    "text",
    ["rand-m11", "rand-n0", "rand-n1.5", "rand-inc2", "rand-w0", "random-m7", "rand-m7-m8", "augmix-m3", "v1", "", "rand-"],
)
def test_wrong_policies(text: str) -> None:
    with pytest.raises(ValueError, match=f"data.augment is {text!r}; allowed: v0, or rand with any of m"):
        read_config(None, [f"data.augment='{text}'"], complete=False)


def test_names_of_other_programs() -> None:
    for name in ("aa", "data.auto_augment", "randaugment"):
        with pytest.raises(ValueError, match="the nearest is data.augment"):
            read_config(None, [f"{name}=v0"], complete=False)
    assert AugmentPolicy.parse("rand") == AugmentPolicy.parse("rand-m10-n2-mstd0-inc0")


def test_frames_of_a_clip_share_the_draw(tmp_path: Path) -> None:
    """Every frame is the same grey picture, brighter from frame to frame, and stays so but for the operations."""
    write_video(tmp_path / "a.avi", frames=4, width=64, height=64, step=30)
    options = {"train": True, "scale": (1.0, 1.0), "flip": 0.0, "dtype": torch.uint8}
    plain, augmented = ClipFolder(tmp_path, 4, 64, **options), ClipFolder(tmp_path, 4, 64, **options, augment=UPSTREAM)
    policy, changed = AugmentPolicy.parse(UPSTREAM), 0
    for epoch in range(6):
        seen, clip = plain.sample(0, epoch).clip, augmented.sample(0, epoch).clip
        assert torch.equal(clip, augmented.sample(0, epoch).clip) and clip.dtype == torch.uint8
        changed += not torch.equal(clip, seen)
        rng = random.Random(f"0 {epoch} 0")
        augmented.preprocessing.frame_numbers(tmp_path / "a.avi", 4, None, rng)
        Crop.sample(rng, (1.0, 1.0), 0.0)
        operations = policy.draw(rng)
        if not SHAPES & {o.name for o in operations}:  # on a frame of one colour the crop changes nothing
            due = [apply_operations(image, operations) for image in seen.permute(1, 2, 3, 0)]
            assert torch.equal(clip, torch.stack(due).permute(3, 0, 1, 2))
    assert changed >= 3


def test_images_are_augmented_behind_the_crop(tmp_path: Path) -> None:
    """What becomes free of an image has the mean colour, of a clip grey."""
    write_images(tmp_path / "frames", [f"{i}.png" for i in range(4)])
    found = set()
    for frames, fill in ((None, MEAN_BYTES), (2, GREY)):
        folder = ClipFolder(tmp_path, frames, 16, train=True, scale=(1.0, 1.0), augment="rand-m9-n1", dtype=torch.uint8)
        colour = torch.tensor(fill, dtype=torch.uint8)
        for epoch in range(20):
            clip = folder.sample(0, epoch).clip
            if (clip.flatten(1) == colour[:, None]).all(0).any():
                found.add(frames)
    assert found == {None, 2}


def test_float_clips_are_the_bytes_normalised(tmp_path: Path) -> None:
    write_images(tmp_path / "frames", [f"{i}.png" for i in range(4)])
    pairs = [
        ClipFolder(tmp_path, None, 16, train=True, augment="rand-m9-n4", dtype=dtype) for dtype in (torch.float32, torch.uint8)
    ]
    for epoch in range(8):
        x, y = (folder.sample(1, epoch).clip for folder in pairs)
        near = (x - normalise(y.float() / 255)).abs().max()
        assert near <= 0.5 / 255 / 0.224 + 1e-6  # without an operation floats are not rounded to bytes


def test_without_pillow_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """When the dataset is made, and not in a worker at the first clip that is changed."""
    write_video(tmp_path / "a.avi", frames=2, width=16, height=16)
    monkeypatch.setitem(sys.modules, "PIL", None)
    for use in (lambda: after("Invert", 0), lambda: ClipFolder(tmp_path, 2, 16, train=True, augment="v0")):
        with pytest.raises(ImportError, match=r"pip install 'videomamba-bench\[train\]'"):
            use()
    ClipFolder(tmp_path, 2, 16, train=True)
