"""Parts of training: clips, masks, losses, mixtures, parameter groups, the schedule, the seed. `import fused` leaves it out.

    groups = parameter_groups(model, lr=1.2e-3, weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = cosine_schedule(optimizer, total_steps, warmup_steps)

`python -m fused.train` is a whole training made of them, from a folder of videos to a model.

Stochastic depth and recomputation are the model's: `drop_path_rate`, `use_checkpoint` and `checkpoint_num` of its
configuration.
"""

from .data import Batch, Batches, ClipFolder, batches
from .losses import (
    MatchingPairs,
    alignment_loss,
    contrastive_loss,
    distillation_loss,
    masked_language_loss,
    matching_loss,
    matching_pairs,
    similarity,
)
from .masks import attention_mask, clip_row_mask, frame_row_mask, keep_visible, random_mask, tube_mask
from .mix import Mixed, cutmix, mix, mixup
from .optim import parameter_groups
from .schedule import cosine_schedule
from .seed import setup_seed
from .teachers import ClipTeacher, TeacherOutput
from .text import TextEncoder, TextOutput
from .words import mask_words

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
