"""Masks of every kind: structure, equal counts in every clip, seeds, probabilities, errors."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fused import VideoMambaConfig, VideoMambaEncoder
from fused.train import attention_mask, clip_row_mask, frame_row_mask, keep_visible, random_mask, tube_mask

KINDS = {"random": random_mask, "tube": tube_mask, "clip-row": clip_row_mask, "frame-row": frame_row_mask}
GRIDS = [(8, 14, 14), (1, 3, 5), (4, 2, 2)]
RATIOS = [0, 0.1, 0.5, 0.65, 0.8, 0.9, 0.99]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attention_of(batch: int, grid: tuple[int, int, int], seed: int = 0) -> Tensor:
    return torch.rand(batch, grid[0], grid[1] * grid[2], generator=seeded(seed))


def draw(kind: str, batch: int, grid: tuple[int, int, int], ratio: float, generator: torch.Generator | None = None) -> Tensor:
    if kind == "attention":
        return attention_mask(attention_of(batch, grid), ratio, generator)
    return KINDS[kind](batch, grid, ratio, generator)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_counts(grid: tuple[int, int, int], ratio: float) -> None:
    frames, rows, columns = grid
    counts = {
        "random": int(ratio * frames * rows * columns),
        "tube": frames * int(ratio * rows * columns),
        "clip-row": frames * int(ratio * rows) * columns,
        "frame-row": frames * int(ratio * rows) * columns,
        "attention": frames * int(ratio * rows * columns),
    }
    for kind, count in counts.items():
        mask = draw(kind, 3, grid, ratio, seeded(1))
        assert mask.dtype == torch.bool and mask.shape == (3, 1 + frames * rows * columns)
        assert not mask[:, 0].any(), "CLS is visible"
        assert mask.sum(1).tolist() == [count] * 3, kind


def frames_of(kind: str, batch: int = 64, ratio: float = 0.5, grid: tuple[int, int, int] = (4, 6, 5)) -> Tensor:
    return draw(kind, batch, grid, ratio, seeded(2))[:, 1:].unflatten(1, grid)


def test_structure() -> None:
    tube, rows = frames_of("tube"), {kind: frames_of(kind) for kind in ("clip-row", "frame-row")}
    assert (tube == tube[:, :1]).all()
    for kind, mask in rows.items():
        assert (mask == mask[..., :1]).all(), f"{kind}: a row is hidden or not"
        whole = mask[..., 0]
        assert (whole != whole[:, :1]).any(1).any(1).float().mean() > 0.9, f"{kind}: other rows in other frames"
    assert (rows["frame-row"][..., 0].sum(2) == 3).all()
    lost = rows["clip-row"][..., 0].sum(2)
    assert lost.min() < 3 < lost.max(), "frames differ in how many rows they lose"
    for kind in ("random", "attention"):
        mask = frames_of(kind)
        assert (mask != mask[:, :1]).any() and (mask != mask[..., :1]).any()
    assert (frames_of("random").flatten(2).sum(2) != 15).any()
    assert (frames_of("attention").flatten(2).sum(2) == 15).all()


@pytest.mark.parametrize("kind", [*KINDS, "attention"])
def test_seeds(kind: str) -> None:
    grid = (4, 6, 5)
    once = draw(kind, 3, grid, 0.5, seeded(5))
    assert torch.equal(once, draw(kind, 3, grid, 0.5, seeded(5)))
    assert not torch.equal(once, draw(kind, 3, grid, 0.5, seeded(6)))
    assert not torch.equal(once[0], once[1]), "every clip has its own"
    generator = seeded(5)
    assert not torch.equal(*(draw(kind, 3, grid, 0.5, generator) for _ in range(2))), "the generator goes on"
    with torch.random.fork_rng():
        torch.manual_seed(5)
        assert torch.equal(once, draw(kind, 3, grid, 0.5)), "None is PyTorch's own generator"


def assert_likely(found: Tensor, share: Tensor | float, draws: int) -> None:
    """Assert that counts of independent draws lie within five standard deviations of their expectation."""
    share = torch.as_tensor(share, dtype=torch.float64)
    assert ((found - draws * share).abs() <= 5 * (draws * share * (1 - share)).sqrt()).all(), found / draws


@pytest.mark.parametrize("kind", KINDS)
def test_no_place_is_preferred(kind: str) -> None:
    mask = draw(kind, 4000, (2, 4, 3), 0.5, seeded(3))
    assert_likely(mask[:, 1:].sum(0), 0.5, 4000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_a_probability(dtype: torch.dtype) -> None:
    """One visible patch has probability a / sum of its attention a; two visible patches have Luce's probability."""
    share = torch.tensor([1.0, 2.0, 5.0]).double() / 8
    attention = torch.tensor([1.0, 2.0, 5.0], dtype=dtype).expand(2000, 2, 3)
    one = ~attention_mask(attention, 0.67, seeded(4))[:, 1:].reshape(4000, 3)
    assert_likely(one.sum(0), share, 4000)
    two = ~attention_mask(attention, 0.34, seeded(4))[:, 1:].reshape(4000, 3)
    assert (two.sum(1) == 2).all()
    for i, j in itertools.combinations(range(3), 2):
        p, q = share[i], share[j]
        assert_likely((two[:, i] & two[:, j]).sum(), p * q / (1 - p) + p * q / (1 - q), 4000)


def test_patches_without_attention_go_first() -> None:
    attention = torch.tensor([0.0, 1e-30, 0.0, 1.0]).expand(500, 1, 4)
    mask = attention_mask(attention, 0.5, seeded(5))
    assert torch.equal(mask[:, 1:], (attention == 0).flatten(1))
    three = ~attention_mask(attention, 0.25, seeded(5))[:, 1:]
    assert_likely(three[:, [0, 2]].sum(0), 0.5, 500)


CONFIG = VideoMambaConfig(img_size=32, patch_size=8, depth=1, embed_dim=16, num_frames=2, clip_output_dim=6)


@pytest.mark.parametrize("kind", [*KINDS, "attention"])
def test_the_encoder_takes_them(kind: str) -> None:
    grid = (CONFIG.tubelets, *CONFIG.grid)
    mask = draw(kind, 2, grid, 0.5, seeded(6))
    output = VideoMambaEncoder(CONFIG).eval()(torch.randn(2, 3, 2, 32, 32, generator=seeded(7)), mask)
    seen = int((~mask[0]).sum())
    assert output.clip.shape == (1, 2, seen, 6) and output.tokens.shape == (2, seen - 1, 16)


def test_keep_visible() -> None:
    mask = random_mask(2, (2, 3, 3), 0.5, seeded(8))
    features = torch.randn(3, 2, 19, 4, generator=seeded(9), requires_grad=True)
    wanted = torch.stack([layer[~mask].view(2, -1, 4) for layer in features])
    kept = keep_visible(features, mask)
    assert torch.equal(kept, wanted) and torch.equal(keep_visible(features[0], mask), wanted[0])
    kept.sum().backward()
    assert torch.equal(features.grad, (~mask)[..., None].expand(3, 2, 19, 4).float())


@pytest.mark.usefixtures("unchecked")
def test_errors_of_keep_visible() -> None:
    mask = random_mask(2, (2, 3, 3), 0.5, seeded(8))
    with pytest.raises(ValueError, match=r"features must have shape \(\.\.\., B, L, C\), got \(2, 19\)"):
        keep_visible(torch.zeros(2, 19), mask)
    with pytest.raises(ValueError, match=r"mask is torch.bool \(2, 19\); allowed is bool \(2, 18\)"):
        keep_visible(torch.zeros(2, 18, 4), mask)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arguments", "error", "wanted"),
    [
        ((0, (2, 3, 3), 0.5), ValueError, "batch must be an integer from 1 up, got 0"),
        ((2.0, (2, 3, 3), 0.5), TypeError, "batch must be an integer from 1 up, got float"),
        ((2, (2, 9), 0.5), TypeError, r"grid must be a tuple \(tubelets, rows, columns\) of positive integers, got \(2, 9\)"),
        ((2, (2, 0, 3), 0.5), ValueError, "grid's rows must be an integer from 1 up, got 0"),
        ((2, (2, 3, 3), 1), ValueError, r"ratio must be a number in \[0, 1\), got 1"),
        ((2, (2, 3, 3), -0.1), ValueError, r"ratio must be a number in \[0, 1\), got -0.1"),
        ((2, (2, 3, 3), float("nan")), ValueError, r"ratio must be a number in \[0, 1\), got nan"),
        ((2, (2, 3, 3), "0.5"), TypeError, r"ratio must be a number in \[0, 1\), got str"),
        ((2, (2, 3, 3), 0.5, 7), TypeError, "generator must be a torch.Generator on the CPU, or None, got int"),
    ],
)
def test_errors(kind: str, arguments: tuple[Any, ...], error: type[Exception], wanted: str) -> None:
    with pytest.raises(error, match=wanted):
        KINDS[kind](*arguments)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("attention", "error", "wanted"),
    [
        (torch.rand(2, 9), ValueError, r"attention must have shape \(B, T, P\), got \(2, 9\)"),
        (torch.ones(2, 3, 9, dtype=torch.int64), TypeError, "attention must be real floating point .*got torch.int64"),
        (torch.rand(2, 0, 9), ValueError, r"attention must not be empty, got \(2, 0, 9\)"),
        (torch.rand(2, 3, 9) - 2, ValueError, "attention must be finite and 0 or more, got values from -"),
        (torch.tensor([[[1.0, float("inf")]]]), ValueError, "finite and 0 or more, got values from 1 to inf"),
        (torch.tensor([[[1.0, float("nan")]]]), ValueError, "finite and 0 or more, got values from nan to nan"),
    ],
)
def test_errors_of_attention(attention: Tensor, error: type[Exception], wanted: str) -> None:
    with pytest.raises(error, match=wanted):
        attention_mask(attention, 0.5)
