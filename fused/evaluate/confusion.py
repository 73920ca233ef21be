"""The picture of a confusion matrix."""

from pathlib import Path

from fused.evaluate.results import Results
from fused.io.atomic_write import atomic_write

MAX_NAMES = 60  # classes whose names can be read beside the rows


def draw_confusion(results: Results, path: Path) -> None:
    """Write a PNG of the confusion: a row for each label, darker for a larger share of its videos.

    Raises ImportError, with what to do, without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is not installed: pip install 'videomamba-bench[evaluate]'") from error
    names = [result.name for result in results.classes]
    shares = [[n / max(sum(row), 1) for n in row] for row in results.confusion]
    side = min(max(4.0, 0.25 * len(names) + 2), 16.0)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(picture, label="share of the label's videos", shrink=0.8)
    axes.set(xlabel="prediction", ylabel="label")
    if len(names) <= MAX_NAMES:
        axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
    with atomic_write(path) as draft:
        figure.savefig(draft, format="png", dpi=150)
