"""Models of pictures that are no squares: rows and columns cannot be taken for each other."""

import pytest
import torch

from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.embedding import PatchEmbed
from fused.modules.norm import Norm


@pytest.mark.parametrize("tubelet", [1, 2])
@torch.no_grad()
def test_visible_patches_are_those_of_the_whole(tubelet: int) -> None:
    config = VideoMambaConfig(img_size=(32, 64), patch_size=16, num_frames=4, kernel_size=tubelet, depth=1, embed_dim=16)
    embed, clip = PatchEmbed(config), torch.randn(2, 3, 4, 32, 64)
    every = embed(clip)
    assert every.shape == (2, 4 // tubelet * 2 * 4, 16)
    visible = torch.stack([torch.randperm(every.shape[1])[:7].sort().values for _ in range(2)])
    for i, chosen in enumerate(visible):
        torch.testing.assert_close(embed(clip, visible)[i], every[i, chosen])
    first = torch.nn.functional.conv3d(clip, embed.proj.weight, embed.proj.bias, stride=(tubelet, 16, 16))
    torch.testing.assert_close(every, first.flatten(2).mT)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_norms_epsilon_is_its_own(kind: str) -> None:
    x = torch.randn(3, 8)
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.5).sqrt()
    torch.testing.assert_close(Norm(8, eps=0.5, kind=kind)(x), expected)
