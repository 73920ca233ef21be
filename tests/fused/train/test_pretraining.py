"""Ten steps of masked alignment with a frozen random teacher, with the functions of `fused.train`."""

import pytest
import torch

from fused import VideoMambaConfig, VideoMambaEncoder
from fused.train import alignment_loss, attention_mask, cosine_schedule, keep_visible, parameter_groups

CONFIG = VideoMambaConfig(
    img_size=32, patch_size=8, depth=3, embed_dim=32, num_frames=2, clip_output_dim=8, clip_return_layer=2,
    add_pool_norm=False, drop_path_rate=0.1, use_checkpoint=True, checkpoint_num=2,
)  # fmt: skip
STEPS = 10


def pretrain(kind: str, seed: int = 0) -> tuple[list[float], VideoMambaEncoder, VideoMambaEncoder]:
    """Return the losses of all steps, the student and the teacher."""
    torch.manual_seed(seed)
    teacher = VideoMambaEncoder(CONFIG).eval().requires_grad_(False)
    student = VideoMambaEncoder(CONFIG).train()
    clips = torch.randn(4, 3, 2, 32, 32)
    attention = torch.rand(4, CONFIG.tubelets, CONFIG.patches)  # where a teacher's CLS looks
    groups = parameter_groups(student, lr=3e-3, weight_decay=0.05, layer_decay=0.9, rule="corrected")
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = cosine_schedule(optimizer, STEPS, warmup_steps=2, warmup_start=0.1, floor=0.01)
    targets = teacher(clips).clip  # (2, B, L, 8)
    losses = []
    for _ in range(STEPS):
        mask = attention_mask(attention, 0.8)
        loss = alignment_loss(student(clips, mask).clip, keep_visible(targets, mask), kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, student, teacher


@pytest.mark.parametrize("kind", ["l2", "mse", "smooth_l1"])
def test_the_loss_falls(kind: str) -> None:
    with torch.random.fork_rng():
        losses, student, teacher = pretrain(kind)
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3]), losses
    assert all(p.grad is None for p in teacher.parameters())
    untrained = {name for name, p in student.named_parameters() if p.grad is None}
    last = {name for name, _ in student.named_parameters() if name.startswith("layers.2.mixer.")}
    # upstream's features end before the last mixer; the final norm is shared with the layer before
    assert untrained == last | {"layers.2.norm.weight"}
