"""Functions for training: clips, masks, losses, mixup, parameter groups, the schedule, the seed. Not part of `import fused`.

    groups = parameter_groups(model, lr=1.2e-3, weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = cosine_schedule(optimizer, total_steps, warmup_steps)

`python -m fused.train` is a complete training made of them, from a folder of videos to a model.

Stochastic depth and activation recomputation belong to the model: `drop_path_rate`, `use_checkpoint` and `checkpoint_num` of
its configuration.
"""

from fused.train.data.batches import Batch, Batches, batches
from fused.train.data.clips import ClipFolder
from fused.train.data.mixup import Mixed, cutmix, mix, mixup
from fused.train.objectives.losses import (
    MatchingPairs,
    alignment_loss,
    contrastive_loss,
    distillation_loss,
    masked_language_loss,
    matching_loss,
    matching_pairs,
    similarity,
)
from fused.train.objectives.masks import attention_mask, clip_row_mask, frame_row_mask, keep_visible, random_mask, tube_mask
from fused.train.objectives.teachers import ClipTeacher, TeacherOutput
from fused.train.objectives.text_encoder import TextEncoder, TextOutput
from fused.train.objectives.text_masking import mask_words
from fused.train.optim import parameter_groups
from fused.train.schedule import cosine_schedule
from fused.train.seed import setup_seed

__all__ = [
    "Batch",
    "Batches",
    "ClipFolder",
    "ClipTeacher",
    "MatchingPairs",
    "Mixed",
    "TeacherOutput",
    "TextEncoder",
    "TextOutput",
    "alignment_loss",
    "attention_mask",
    "batches",
    "clip_row_mask",
    "contrastive_loss",
    "cosine_schedule",
    "cutmix",
    "distillation_loss",
    "frame_row_mask",
    "keep_visible",
    "mask_words",
    "masked_language_loss",
    "matching_loss",
    "matching_pairs",
    "mix",
    "mixup",
    "parameter_groups",
    "random_mask",
    "setup_seed",
    "similarity",
    "tube_mask",
]
