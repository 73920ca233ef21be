"""Small models of both packages with the same weights, their clips and masks, and everything that a call of them gives."""

import torch
from golden import fill, golden
from torch import Tensor

import fused
import reference

TOY = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_frames": 4, "num_classes": 5, "clip_output_dim": 12}


def models(kind: str, overrides: dict) -> tuple:
    """The reference's and fused's model in float64 with the same weights, which pass from one to the other strictly."""
    plain, fast = (getattr(p, kind)(p.VideoMambaConfig(**TOY | overrides)) for p in (reference, fused))
    golden(plain)
    fast.load_state_dict(plain.state_dict(), strict=True)
    return plain.double(), fast.double().eval()


def clip_of(config, use_image: bool = False) -> Tensor:
    height, width = config.img_size if isinstance(config.img_size, tuple) else (config.img_size,) * 2
    frames = [] if config.num_frames is None else [config.kernel_size if use_image else config.num_frames]
    return fill(2, config.channels, *frames, height, width, phase=7).double()


def mask_of(length: int, tubelets: int | None = None) -> Tensor:
    """Half of the tokens hidden, others in each clip; with `tubelets` as many in each of them."""
    generator = torch.Generator().manual_seed(length)
    parts = tubelets or 1
    noise = torch.rand(2, parts, (length - 1) // parts, generator=generator)
    hidden = (noise.argsort(-1) < noise.shape[-1] // 2).flatten(1)
    return torch.cat((torch.zeros(2, 1, dtype=torch.bool), hidden), dim=1)


def flat(output) -> list[Tensor]:
    return [x for x in (output if isinstance(output, tuple) else (output,)) if x is not None]


def results(model, clip: Tensor, **how) -> dict[str, Tensor | None]:
    """Outputs, and the gradients of the clip and every parameter, for one fixed cotangent."""
    clip = clip.clone().requires_grad_()
    outputs = flat(model(clip, **how))
    torch.stack([(y * fill(*y.shape, phase=3).to(y.dtype)).sum() for y in outputs]).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {f"output {i}": y.detach() for i, y in enumerate(outputs)} | {"clip": clip.grad} | grads


def assert_same(got: dict, wanted: dict) -> None:
    """To 1e-12 in both norms; no gradient where the reference has none, exact zeros where it has exact zeros."""
    assert got.keys() == wanted.keys()
    for name, truth in wanted.items():
        assert (got[name] is None) == (truth is None), name
        if truth is not None:
            assert got[name].dtype == truth.dtype and got[name].shape == truth.shape, name
            error = got[name] - truth
            assert error.norm() <= 1e-12 * truth.norm() and error.abs().max() <= 1e-12 * truth.abs().max(), name
