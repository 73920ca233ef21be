"""The least time that the hardware needs for a point, from ceilings measured in the same run.

An operator is bound by the bytes that it must move, by its exponentials, or by the instructions around them, whichever is
dearest; a model by the sum over its parts, one after another. Exponentials are not replaced by polynomials. On the GPUs
meant here a multiprocessor issues 8 lane-instructions for each special function (128 and 16 a cycle).
"""

from fused import VideoMambaConfig
from harness.baselines.vit import ViTConfig
from harness.bench.ceilings import Ceilings
from harness.records.speed import Point

ISSUED_PER_EXP = 8


def bound(point: Point, subject: str, variant: str, ceilings: Ceilings) -> float:
    """Seconds of one call at least."""
    io, train = {"float32": 4, "float64": 8}.get(point.dtype, 2), point.mode == "train"
    if subject == "vit":
        return _vit(point, variant, train, ceilings)
    if subject == "videomamba":
        config = getattr(VideoMambaConfig, variant)()
        ways = 1 if point.race == "stream" else 2
        return config.depth * _layer(point.tokens, config.embed_dim, io, train, ceilings, ways)
    if subject == "mixer":
        return _mixer(point.tokens, point["D"], io, train, ceilings)
    if subject in ("scan", "scan_both"):
        return (2 if subject == "scan_both" else 1) * _scan(point.tokens, point["E"], point["N"], io, train, ceilings)
    if subject == "conv":
        return point.tokens * point["E"] * io * (5 if train else 2) / ceilings.copy
    return _norm(point.tokens, point["D"], io, train, ceilings)


def _scan(tokens: int, E: int, N: int, io: int, train: bool, ceilings: Ceilings) -> float:
    """Forward reads u, delta, z, B and C and writes y: N + 4 exponentials and 5 N + 30 instructions an element. Backward
    reads them and dy and writes five gradients, with states from checkpoints every 16 tokens, in 13 to 14 N instructions."""
    share = tokens * E

    def dearest(moved: float, exps: float, issued: float) -> float:
        return share * max(moved / ceilings.copy, exps / ceilings.exp, issued / (ISSUED_PER_EXP * ceilings.exp))

    forward = dearest(4 * io + 2 * N * io / E, N + 4, 5 * N + 30)
    if not train:
        return forward
    return forward + dearest(7 * io + 4 * N / 16 + 16 * N / E + 8 * 2 * N / 64, N + 5, 12.5 * N + 59)


def _norm(tokens: int, D: int, io: int, train: bool, ceilings: Ceilings) -> float:
    """Forward reads x and the float32 residual and writes y and the residual; backward reads dy, dresidual and the residual
    and writes dx and dresidual."""
    return tokens * D * (2 * io + 8 + (2 * io + 12 if train else 0)) / ceilings.copy


def _mixer(tokens: int, D: int, io: int, train: bool, ceilings: Ceilings, ways: int = 2) -> float:
    """in_proj, then both ways (or one) conv, x_proj, dt_proj and scan, then out_proj; a backward is two matmuls for each."""
    E, N, R = 2 * D, 16, -(-D // 16)
    operations = 2 * tokens * (D * 2 * E + E * D + ways * (E * (R + 2 * N) + R * E)) * (3 if train else 1)
    conv = tokens * E * io * (1 + ways) * (2 if train else 1) / ceilings.copy  # both ways share one reading of x
    return operations / ceilings.matmul + conv + ways * _scan(tokens, E, N, io, train, ceilings)


def _layer(tokens: int, D: int, io: int, train: bool, ceilings: Ceilings, ways: int) -> float:
    return _mixer(tokens, D, io, train, ceilings, ways) + _norm(tokens, D, io, train, ceilings)


def _vit(point: Point, variant: str, train: bool, ceilings: Ceilings) -> float:
    """qkv, proj and the two of the MLP are 12 D^2 a token, attention 2 L D; the backward of attention takes 2.5 forwards."""
    config = getattr(ViTConfig, variant)()
    D, depth = config.embed_dim, config.depth
    linear, attention = 2 * point.tokens * 12 * D * D, 2 * point.tokens * 2 * point["L"] * D
    operations = linear * (3 if train else 1) + attention * (3.5 if train else 1)
    return depth * operations / ceilings.matmul
