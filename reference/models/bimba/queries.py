"""The queries of BIMBA: features of frames, pooled in space and, if wanted, in time."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def bimba_queries(
    features: Float[Tensor, "*B F H W C"],
    pool: str = "bilinear",
    temporal_pooling: int = 1,
    stride: int = 2,
    frame_stride: int = 1,
) -> Float[Tensor, "*B G Q C"]:
    """Return the initial queries (F', H' W', C) of the features (F, H, W, C) of frames, or of a batch (B, F, H, W, C) of them.

    First every `frame_stride`-th frame is taken, then means of `temporal_pooling` successive frames; frames that do not fill
    a mean are left out. Then each frame is pooled by `stride`: "bilinear" to ceil(H / stride) rows (without antialiasing),
    "average" and "max" over windows, to floor(H / stride) rows; columns alike.

    The released BIMBA has the defaults, so that 27 x 27 features become 14 x 14 queries and no frame is left out. The paper's
    16 to 1 is pool="average", frame_stride=4. Conditioning on the question, as in the paper, was not released and is not here.

    Raise ValueError for features of another number of dimensions, an unknown `pool`, and steps that leave no query.
    """
    if features.dim() not in (4, 5):
        raise ValueError(f"features have shape {tuple(features.shape)}; allowed are (F, H, W, C) and (B, F, H, W, C)")
    if pool not in ("bilinear", "average", "max"):
        raise ValueError(f"pool is {pool!r}; allowed are 'bilinear', 'average' and 'max'")
    for name, value in (("temporal_pooling", temporal_pooling), ("stride", stride), ("frame_stride", frame_stride)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; allowed are whole numbers from 1 up")
    x = features[..., ::frame_stride, :, :, :]
    frames, (H, W, C) = x.shape[-4] // temporal_pooling, x.shape[-3:]
    rows, columns = (-(-H // stride), -(-W // stride)) if pool == "bilinear" else (H // stride, W // stride)
    if 0 in (frames, rows, columns):
        raise ValueError(
            f"features of {x.shape[-4]} frames of {H} x {W} leave no query with temporal_pooling {temporal_pooling} and "
            f"stride {stride}; allowed are steps of at most as many frames, rows and columns"
        )
    x = x[..., : frames * temporal_pooling, :, :, :].unflatten(-4, (frames, temporal_pooling)).mean(-4)
    planes = x.reshape(-1, H, W, C).permute(0, 3, 1, 2)
    if pool == "bilinear":
        planes = F.interpolate(planes, size=(rows, columns), mode="bilinear")
    else:
        planes = (F.avg_pool2d if pool == "average" else F.max_pool2d)(planes, stride)
    return planes.permute(0, 2, 3, 1).reshape(*x.shape[:-3], rows * columns, C)
