"""The queries of BIMBA: features of frames, pooled in space and, if wanted, in time."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fused.runtime.checks import check_choice, check_tensor

POOLS = ("bilinear", "average", "max")


def bimba_queries(
    features: Float[Tensor, "*B F H W C"],
    pool: str = "bilinear",
    temporal_pooling: int = 1,
    stride: int = 2,
    frame_stride: int = 1,
) -> Float[Tensor, "*B G Q C"]:
    """Return initial queries (G, Q, C) of the features (F, H, W, C) of frames, or of a batch (B, F, H, W, C) of clips.

    Of every `frame_stride`-th frame, means over `temporal_pooling` frames are taken; frames that do not fill a mean are left
    out. Each is pooled by `stride`: "bilinear" (no antialiasing) to ceil(H / stride) rows, "average" and "max" to
    floor(H / stride), columns alike. Q counts rows times columns, in raster order.

    The defaults are the released BIMBA's: 27 x 27 features of a frame become 14 x 14 queries. The paper's 16 to 1 is
    pool="average", frame_stride=4. The paper's conditioning on the question was not released and is not here.

    Raises TypeError for features that are no floating-point numbers; ValueError for another number of dimensions, an unknown
    `pool`, and steps that leave no query.
    """
    check_tensor("bimba_queries", "features", features, "F H W C | B F H W C", {}, None)
    check_choice("bimba_queries", "pool", pool, POOLS)
    for name, value in (("temporal_pooling", temporal_pooling), ("stride", stride), ("frame_stride", frame_stride)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"bimba_queries: {name} must be a whole number from 1 up, got {value!r}")
    clips = (features if features.dim() == 5 else features[None])[:, ::frame_stride]
    B, F_, H, W, C = clips.shape
    frames = F_ // temporal_pooling
    size = tuple(-(-n // stride) if pool == "bilinear" else n // stride for n in (H, W))
    if 0 in (frames, *size):
        raise ValueError(
            f"bimba_queries: {F_} frames of {H} x {W} leave no query with temporal_pooling={temporal_pooling} and "
            f"stride={stride}; allowed are steps of at most as many frames, rows and columns"
        )
    if temporal_pooling > 1:
        clips = clips[:, : frames * temporal_pooling].unflatten(1, (frames, temporal_pooling)).mean(2)
    planes = clips.flatten(0, 1).permute(0, 3, 1, 2)
    if pool == "bilinear":
        pooled = F.interpolate(planes, size=size, mode="bilinear", align_corners=False)
    elif pool == "average":
        pooled = F.avg_pool2d(planes, stride)
    else:
        pooled = F.max_pool2d(planes, stride)
    queries = pooled.permute(0, 2, 3, 1).reshape(B, frames, size[0] * size[1], C)
    return queries if features.dim() == 5 else queries[0]
