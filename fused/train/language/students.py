"""The models of language training: each takes a row of samples and returns its loss."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fused.models.bimba.model import Bimba, place_labels
from fused.models.vamba.loss import IGNORED, distillation_loss, next_token_loss
from fused.models.vamba.model import Vamba
from fused.models.vamba.teacher import Place, stock_logits
from fused.models.vamba.vision import frame_features
from fused.runtime.dtypes import accumulation_dtype
from fused.train.language.options import LanguageConfig


class VambaStudent(nn.Module):
    """A `Vamba` on packed rows: each sample reads its own text and video alone."""

    def __init__(self, model: Vamba, options: LanguageConfig) -> None:
        super().__init__()
        self.model, self.options = model, options
        model.recompute_layers = options.recompute

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that are gathered one at a time where parameters are sharded.

        The vision tower is not among them: its calls differ in number between processes, whose gathering would then not meet.
        """
        return list(self.model.model.layers)

    def forward(
        self, tokens: Int[Tensor, "1 L"], labels: Int[Tensor, "1 L"], layout: Int[Tensor, "samples 6"],
        weights: Float[Tensor, "2"], *frames: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Return the loss (), and its parts where there is a distillation.

        `layout` has a sample's text tokens, video tokens, text tokens before the video, and its grid. Frames (T, 3, h, w) are
        those of the samples that have some, in order. The loss is `weights[0]` times the sum over the learnt tokens, and with a
        distillation `weights[1]` times the sum over the samples of the means of their divergences.
        """
        places = [Place(words, video, before, (t, h, w)) for words, video, before, t, h, w in layout.tolist()]
        assert self.model.visual is not None
        video = torch.cat([frame_features(self.model.visual, part) for part in joined(frames)])[None]
        at = torch.cat([torch.arange(place.words, device=tokens.device) for place in places]).expand(3, 1, -1)
        lengths = [[place.video for place in places]]
        logits = self.model(tokens, video=video, position_ids=at, encoder_seq_lens=lengths).logits
        loss = next_token_loss(logits, labels) * (labels != IGNORED).sum() * weights[0]
        options = self.options
        if not options.distillation:
            return loss, {}
        with torch.no_grad():
            count = min(options.distillation_tokens, logits.shape[-1])
            teacher, best = stock_logits(self.model, tokens, video.detach(), places).topk(count)
        divergence, word = loss.new_zeros(()), 0
        for place in places:
            row = slice(word, word + place.words)
            parts = logits[:, row], labels[:, row], teacher[:, row], best[:, row]
            divergence = divergence + distillation_loss(*parts, shift=options.distillation_shift)
            word += place.words
        divergence = divergence * weights[1]
        return loss + options.distillation * divergence, {"cross_entropy": loss.detach(), "divergence": divergence.detach()}


class BimbaStudent(nn.Module):
    """A `Bimba` with adapters of its language model, on one sample at a time; the vision tower is frozen.

    What learns is float32. The rest keeps its dtype.
    """

    def __init__(self, model: Bimba, options: LanguageConfig) -> None:
        super().__init__()
        self.model, self.options = model, options
        peft = import_peft()
        self.lora = peft.LoraConfig(
            r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=list(options.lora_targets),
            lora_dropout=options.lora_dropout, bias="none", task_type="CAUSAL_LM",
        )  # fmt: skip
        model.requires_grad_(False)
        peft.inject_adapter_in_model(self.lora, model.language_model)
        for name, parameter in model.named_parameters():
            if "lora_" in name or name.startswith(("mm_projector.", "compressor.")):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        if options.recompute:
            recompute(model.language_model)

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that are gathered one at a time where parameters are sharded; see `VambaStudent.blocks`."""
        return list(self.model.language_model.model.layers)

    def forward(
        self, tokens: Int[Tensor, "1 L"], labels: Int[Tensor, "1 L"], layout: Tensor, weights: Float[Tensor, "2"],
        *frames: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Return the loss (): `weights[0]` times the sum over the learnt tokens. There is one sample; see `Bimba.forward`.

        Logits are computed where the next token is learnt: a whole row of them is more memory than the model's layers need.
        """
        model = self.model
        video = model.compress(model.encode_frames(frames[0]))
        read = video if layout[0, 1] else None
        inputs = model.embed(tokens, read).to(weights.dtype)  # the residual stream is float32, whatever the weights are
        if read is None:
            inputs = inputs + 0 * video.sum()  # all that learns gets a gradient, of 0 here, in every process
        targets = place_labels(tokens, labels, read)[1:]
        learnt = targets != IGNORED
        hidden = model.language_model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state[0, :-1]
        logits = model.language_model.lm_head(hidden[learnt])
        loss = F.cross_entropy(logits.to(accumulation_dtype(logits.dtype)), targets[learnt], reduction="sum")
        return loss * weights[0], {}


def joined(frames: Sequence[Tensor]) -> list[Tensor]:
    """Return frames (T, 3, h, w) of samples with those of neighbours joined that have one size, for fewer passes."""
    runs = groupby(frames, key=lambda part: part.shape[1:])
    return [torch.cat(list(run)) for _, run in runs]


def recompute(model: Any) -> None:
    """Let a model of the library transformers compute its layers again in the backward."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name in newer versions
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def import_peft() -> Any:
    """Return the library peft. Raises ImportError without it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("task bimba-sft needs peft: pip install 'videomamba-bench[language]'") from error
    return peft
