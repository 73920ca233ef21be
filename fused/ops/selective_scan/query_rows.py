"""The table by which a scan's kernels know the tokens at which y is wanted, the query rows."""

import torch
from jaxtyping import Int
from torch import Tensor

from fused.ops.selective_scan.schedule import TILE


def tile_queries(places: Int[Tensor, " Q"], length: int) -> Int[Tensor, "tiles 2"]:
    """Return int32 (tiles, 2) on the device of `places`: the queries before each tile, and a bit for each token that is one.

    `places` are the query rows, ascending and distinct, of a sequence of `length` tokens. Bit i is of token i of the tile.
    """
    tiles = -(-length // TILE)
    tile, bit = places // TILE, torch.ones_like(places) << places % TILE
    masks = torch.zeros(tiles, dtype=torch.int64, device=places.device).index_add_(0, tile, bit)
    counts = torch.zeros_like(masks).index_add_(0, tile, torch.ones_like(places))
    return torch.stack((counts.cumsum(0) - counts, masks), dim=1).int()
