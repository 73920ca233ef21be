"""Videos for the judge: the clip that comes with the project, on which it asks its questions of real input, and made ones."""

from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

_ROOT = Path(__file__).resolve().parent
_PACKAGED, _CHECKOUT = (folder / "data" / "bigbuckbunny.mp4" for folder in (_ROOT, _ROOT.parent / "tests"))
SHIPPED = _CHECKOUT if _CHECKOUT.exists() else _PACKAGED
"""132 frames of Big Buck Bunny, (c) Blender Foundation, CC BY 3.0."""


def write(path: Path, frames: UInt8[Tensor, "T H W 3"]) -> Path:
    """A video file of these frames, RGB, H and W even, in the container that the path's ending names; hardly any loss."""
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=25, options={"qscale": "1"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.qmin = stream.codec_context.qmax = 1
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        out.mux(stream.encode())
    return path
