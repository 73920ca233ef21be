"""The table of temporal positions, stretched to videos of another length, by numbers."""

import pytest
import torch
import torch.nn.functional as F

from fused.models.videomamba.embedding import temporal_positions
from fused.modules.span import Span


def test_positions_lie_between_rows() -> None:
    table = torch.tensor([[[0.0, 10.0], [4.0, 30.0]]])
    found = temporal_positions(table, Span(0, 4, 4))
    assert found.tolist() == [[0.0, 10.0], [1.0, 15.0], [3.0, 25.0], [4.0, 30.0]]
    assert torch.equal(temporal_positions(table, Span(1, 2, 4)), found[1:3]), "a chunk has its own"


@pytest.mark.parametrize(("rows", "total"), [(2, 7), (8, 3), (5, 5), (3, 12)])
def test_they_are_those_of_interpolate(rows: int, total: int) -> None:
    """By the ends of cells, not of rows, as in upstream's loading of checkpoints."""
    table = torch.randn(1, rows, 6, dtype=torch.float64)
    due = F.interpolate(table.mT, size=total, mode="linear", align_corners=False).mT[0]
    torch.testing.assert_close(temporal_positions(table, Span(0, total, total)), due)
