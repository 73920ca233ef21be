"""Video-text training (video_mm of OpenGVLab/VideoMamba): contrast, matching, masked words and alignment with a teacher.

    vtc  every video of all processes against every text, by the cosines of their projections
    vtm  is this the video's text? for the right pairs, a hard negative text of each video, a hard negative video of each text
    mlm  words of the text that are masked, from the others and the video
    uta  the visible tokens of a masked video, against a teacher's features

The loss is the sum of the four, by their weights.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from fused.models.retrieval.model import VideoTextRetrieval
from fused.models.retrieval.words import Tokenizer
from fused.rules import invalid
from fused.train.config import TrainConfig
from fused.train.data.captioned import CaptionData
from fused.train.gather import gather
from fused.train.models import Teacher, make_video_text, pretraining_teacher
from fused.train.objectives.losses import (
    alignment_loss,
    contrastive_loss,
    masked_language_loss,
    matching_loss,
    matching_pairs,
    similarity,
)
from fused.train.objectives.teachers import ClipTeacher
from fused.train.objectives.text_masking import mask_words
from fused.train.task import Metrics, Task
from fused.train.visible_targets import visible_targets


class Retrieval(Task):
    """The training of a `VideoTextRetrieval` on videos, or images, and their captions."""

    student: VideoTextRetrieval

    def __init__(self, config: TrainConfig, data: CaptionData, device: torch.device) -> None:
        super().__init__()
        self.config, self.data = config, data
        self.teachers = self._make_teachers(device) if config.loss.uta else {}
        required = {"clip_return_layer": 0}
        if self.teachers:
            teacher = self.teachers[False]
            required = {"clip_return_layer": teacher.layers, "clip_output_dim": teacher.width}
        self.student = make_video_text(config, required)
        self.tokenizer = Tokenizer(str(self.student.vocabulary))
        if config.text.length > self.student.config.max_position_embeddings:
            most = self.student.config.max_position_embeddings
            raise invalid("text.length", config.text.length, f"at most BERT's {most} positions")
        if config.data.images is not None and self.student.config.video.kernel_size > 1:
            raise invalid("data.images", config.data.images, "null with model.kernel_size above 1, whose patches are of clips")
        if config.loss.mlm and not self.student.config.mlm:
            raise invalid("loss.mlm", config.loss.mlm, "0 with text.bert.mlm false, a model without a head for masked words")

    def encode(self, labels: Tensor) -> Tensor:
        """Return int64 (B, 1 + L): for each pair its id, and the words of its caption."""
        numbers = labels.tolist()
        words = self.tokenizer([self.data.captions[i] for i in numbers], self.config.text.length)
        return torch.cat((torch.tensor([[self.data.ids[i]] for i in numbers]), words.ids), dim=1)

    def prepare(self, clips: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return clips, ids (B,), words, masked words and their answers, each (B, L), a seed, and for uta visible and targets.

        `labels` are as from `encode`. An image (B, 3, H, W) becomes a clip of one frame.
        """
        clips = clips if clips.dim() == 5 else clips[:, :, None]
        ids, words = labels[:, 0], labels[:, 1:]
        kept = (words == self.tokenizer.pad) | (words == self.tokenizer.cls)
        vocabulary = self.student.config.vocab_size
        masked, answers = mask_words(words, self.tokenizer.mask, vocabulary, kept, self.config.text.masked, generator)
        seed = torch.randint(2**62, (), generator=generator)
        if not self.teachers:
            return clips, ids, words, masked, answers, seed
        options, is_image = self.config.mask, self._is_image(clips)
        ratio = options.image_ratio if is_image else options.ratio
        targets = visible_targets(self.teachers[is_image], clips, options.kind, ratio, generator)
        return clips, ids, words, masked, answers, seed, *targets

    def forward(
        self, clips: Tensor, ids: Tensor, words: Tensor, masked: Tensor, answers: Tensor, seed: Tensor,
        visible: Tensor | None = None, targets: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:  # fmt: skip
        """Return the loss () and its parts, for the output of `prepare`.

        A batch in which a video has no text of another id gives no negatives: its matching loss is 0.
        """
        student, weights, shown = self.student, self.config.loss, words != self.tokenizer.pad
        student.clamp_temperature()
        per_frame = visible is None or self.config.mask.kind == "tube"  # other masks leave frames different numbers of tokens
        video = student.encode_video(clips, visible=visible, keep_temporal=per_frame)
        text = student.encode_text(words, shown)
        assert video.pooled is not None
        parts: Metrics = {}
        v, t = (gather(x, weights.gather) for x in (student.vision_proj(video.pooled), student.text_proj(text[:, 0])))
        similarities = similarity(v, t, student.temp)
        if weights.vtc:
            parts["vtc"] = contrastive_loss(similarities, gather(ids))
        if weights.vtm:
            start = len(ids) * dist.get_rank() if dist.is_initialized() else 0
            own = slice(start, start + len(ids))
            parts["vtm"] = self._matching(similarities[own, own], ids, video.tokens, text, shown, int(seed))
        if weights.mlm:
            parts["mlm"] = masked_language_loss(student.predict_words(video.tokens, masked, shown), answers)
        if targets is not None and video.clip is not None:
            parts["uta"] = alignment_loss(video.clip, targets, weights.alignment)
        total = sum((getattr(weights, name) * part for name, part in parts.items()), similarities.new_zeros(()))
        return total, parts | {"temperature": student.temp.detach().to(total.dtype)}

    def _matching(
        self, similarities: Tensor, ids: Tensor, video: Tensor, text: Tensor, shown: Tensor, seed: int
    ) -> Tensor:
        """Return the matching loss of this process's pairs (B,) and of hard negatives among them."""
        if not bool((ids[:, None] != ids).any(dim=1).all()):
            # gradients of 0, not none: all processes add up those of the same parameters
            return self.student.match(video, text, shown).float().sum() * 0
        pairs = matching_pairs(similarities, ids, torch.Generator().manual_seed(seed))
        return matching_loss(self.student.match(video[pairs.videos], text[pairs.texts], shown[pairs.texts]))

    def _is_image(self, clips: Tensor) -> bool:
        return clips.shape[2] == 1 != self.config.data.frames

    def _make_teachers(self, device: torch.device) -> dict[bool, Teacher]:
        """Return the teacher of clips, and with data.images that of images, which is True."""
        config = self.config
        teacher = pretraining_teacher(config, device)
        if config.data.images is None:
            return {False: teacher}
        clip = teacher.forward
        if not isinstance(clip, ClipTeacher):
            raise invalid("data.images", config.data.images, "null with a VideoMamba as teacher, which takes clips only")
        images = ClipTeacher(clip.model, replace(clip.config, num_frames=clip.config.kernel_size), clip.layers)
        return {False: teacher, True: replace(teacher, forward=images, grid=(1, *teacher.grid[1:]))}
