"""Attention kernels by name: a pinned one is the only one allowed, or an error says why it cannot run."""

import pytest
import torch

from fused.errors import BackendError
from harness.baselines import attention
from harness.baselines.vit import ViT, ViTConfig

CUDA = torch.device("cuda")  # names a device; nothing here needs one


@pytest.mark.parametrize("kind", attention.PINNED)
def test_a_pinned_kernel_runs_or_says_why_not(kind: str) -> None:
    model = ViT(ViTConfig(img_size=16, num_frames=None, embed_dim=8, depth=1, num_heads=1, attention=kind))
    with pytest.raises(BackendError, match=f"{kind}.*CUDA only.*attention='sdpa'"):
        model(torch.zeros(1, 3, 16, 16))
    q = torch.zeros(1, 1, 4, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="float16, bfloat16.*float64"):
        attention.attend(q, q, q, kind)
    with pytest.raises(BackendError, match=f"{kind}.*cannot run here"), attention.only(kind, CUDA):
        raise RuntimeError("No available kernel. Aborting execution.")
    with pytest.raises(RuntimeError, match="^else$"), attention.only(kind, CUDA):
        raise RuntimeError("else")


def enabled() -> set[str]:
    on = torch.backends.cuda
    flags = {"cudnn": on.cudnn_sdp_enabled(), "flash": on.flash_sdp_enabled(), "efficient": on.mem_efficient_sdp_enabled()}
    return {name for name, flag in (flags | {"math": on.math_sdp_enabled()}).items() if flag}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", attention.PINNED)
def test_pinning_allows_one_kernel_and_leaves_no_trace(kind: str, strict: bool) -> None:
    """Also cuDNN's under deterministic algorithms, with which PyTorch would refuse it."""
    before, deterministic = enabled(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(strict)
    try:
        with attention.only(kind, CUDA):
            assert enabled() == {kind}
            assert torch.are_deterministic_algorithms_enabled() == strict
            assert torch.is_deterministic_algorithms_warn_only_enabled() == (strict and kind == "cudnn")
        assert enabled() == before and torch.are_deterministic_algorithms_enabled() == strict
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(deterministic)
