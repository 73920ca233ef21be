"""A video-text model at work: the features of videos and texts, their cosines, and the matching scores of the best pairs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fused.backends import check_can_run
from fused.evaluate.feature_store import FeatureStore, VideoFeatures
from fused.evaluate.predictions import weights_digest
from fused.evaluate.retrieval_settings import RetrievalSettings
from fused.evaluate.run import NotFinite
from fused.evaluate.videos import Labelled, VideoViews
from fused.io.preprocessing import Preprocessing
from fused.io.views import Views
from fused.models.retrieval.model import VideoTextRetrieval
from fused.models.retrieval.ranking import OUTSIDE, best_candidates, cosines
from fused.train.data.batches import BadFile, batches
from fused.train.parallel import World
from fused.train.prefetch import Prefetcher

TEXTS_AT_ONCE, VIDEOS_AT_ONCE = 256, 256  # in one forward; in one product of cosines


class Texts(NamedTuple):
    """The features of N texts, on the model's device."""

    words: Tensor  # (N, L, C), for matching
    visible: Tensor  # bool (N, L)
    projected: Tensor  # (N, E) float32


class Engine:
    """A model on a device with its preprocessing, and the folder that keeps the features of videos.

    Every process of `world` makes one. Raises ValueError for a model without a vocabulary and for settings that do not fit it,
    BackendError for a backend that cannot run on the world's device.
    """

    def __init__(self, model: VideoTextRetrieval, settings: RetrievalSettings, folder: Path, world: World) -> None:
        check_can_run(model.vision_encoder.requested_backend, world.device)
        self.model, self.settings, self.world = model.to(world.device).eval(), settings, world
        self.preprocessing = preprocessing_of(model, settings)
        self.tokenizer = model.tokenizer()
        self.tokenizer.check_size(model.config.vocab_size)
        self.text_length = settings.text_length or model.text_length
        if self.text_length > model.config.max_position_embeddings:
            most = model.config.max_position_embeddings
            raise ValueError(f"text_length is {self.text_length}; allowed: at most the {most} positions of the model's BERT")
        self.store = FeatureStore(
            folder,
            {"model": asdict(model.config), "weights": weights_digest(model), "preprocessing": asdict(self.preprocessing),
             "precision": settings.precision, "frame_pattern": settings.frame_pattern},
        )  # fmt: skip

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast of the settings' precision."""
        precision = getattr(torch, self.settings.precision)
        return nullcontext() if precision == torch.float32 else torch.autocast(self.world.device.type, precision)

    @torch.no_grad()
    def encode_videos(self, videos: Sequence[Path]) -> Iterator[tuple[list[Path], list[BadFile]]]:
        """Write the features of the videos that have none; yield what was finished in all processes, batch by batch."""
        pending = [Labelled(video, -1, None) for video in videos if not self.store.has(video)]
        self.world.barrier()  # all have looked before one writes
        if not pending:
            return
        dataset = VideoViews(pending, self.preprocessing, Views(), self.settings.frame_pattern)
        every = batches(
            dataset, self.settings.batch_size, epoch=0, seed=0, workers=self.settings.workers, rank=self.world.rank,
            world=self.world.size, shuffle=False, drop_last=False,
        )  # fmt: skip
        for batch in Prefetcher(iter(every), self.world.device):
            done = []
            if len(batch.clips):
                with self.autocast():
                    output = self.model.encode_video(batch.clips[:, 0])
                    projected = self.model.vision_proj(output.pooled).float().cpu()
                tokens = output.tokens.cpu()
                for index, *parts in zip(batch.indices.tolist(), tokens, projected, strict=True):
                    video = pending[index].path
                    self.store.save(video, VideoFeatures(*(part.clone() for part in parts)))
                    done.append(video)
            gathered = self.world.all_gather((done, batch.bad_files))
            yield [v for part, _ in gathered for v in part], [file for _, part in gathered for file in part]

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Texts:
        """Return the features of texts."""
        found = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            ids, visible = (
                x.to(self.world.device) for x in self.tokenizer(texts[start : start + TEXTS_AT_ONCE], self.text_length)
            )
            with self.autocast():
                words = self.model.encode_text(ids, visible)
                projected = self.model.text_proj(words[:, 0]).float()
            found.append(Texts(words, visible, projected))
        return Texts(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    @torch.no_grad()
    def cosines(self, videos: Sequence[Path], texts: Texts) -> Tensor:
        """Return the cosines (N, M) of N videos, read in chunks, and M texts, float32 on the CPU. Raises NotFinite."""
        rows = []
        for start in range(0, len(videos), VIDEOS_AT_ONCE):
            part = [self.store.load(video).projected for video in videos[start : start + VIDEOS_AT_ONCE]]
            rows.append(cosines(torch.stack(part).to(self.world.device), texts.projected).cpu())
        return self._finite(torch.cat(rows), videos)

    @torch.no_grad()
    def match(self, video: Path, texts: Texts, numbers: Tensor) -> Tensor:
        """Return logits of (no match, match), (n, 2) float32 on the CPU, of one video with the texts of these numbers.

        Raises NotFinite, which names the video.
        """
        tokens = self.store.load(video).tokens.to(self.world.device)[None]
        scores = []
        for part in numbers.to(self.world.device).split(TEXTS_AT_ONCE):
            with self.autocast():
                scores.append(self.model.match(tokens, texts.words[part], texts.visible[part]).float())
        return self._finite(torch.cat(scores).cpu(), [video] * len(numbers))

    def _finite(self, scores: Tensor, videos: Sequence[Path]) -> Tensor:
        """Return scores, a row for each video. Raise NotFinite, which names the first whose scores are not finite."""
        wrong = (~scores.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if wrong:
            precision = self.settings.precision
            raise NotFinite(f"{videos[wrong[0]]}: its scores are not finite in {precision}; allowed: precision=float32")
        return scores

    def rerank(
        self, videos: Sequence[Path], texts: Texts, similarities: Tensor, count: int, tell: Callable[[int], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the matching scores of the best `count` candidates by cosine, of texts (M, N) and of videos (N, M).

        Other candidates get -100. Videos are shared out over processes, and read one at a time: every pair that either side
        asks for is matched once. `tell` is called with the number of videos that are finished.
        """
        by_text = torch.full_like(similarities, OUTSIDE).T.contiguous()
        by_video = torch.full_like(similarities, OUTSIDE)
        wanted = torch.zeros(similarities.shape, dtype=torch.bool)
        wanted.scatter_(1, best_candidates(similarities, count), True)
        of_texts = torch.zeros(similarities.T.shape, dtype=torch.bool)
        of_texts.scatter_(1, best_candidates(similarities.T, count), True)
        found = []
        for number in range(self.world.rank, len(videos), self.world.size):
            numbers = (wanted[number] | of_texts[:, number]).nonzero().flatten()
            found.append((number, numbers, self.match(videos[number], texts, numbers)[:, 1]))
            if tell is not None:
                tell(len(found))
        for number, numbers, scores in (row for rows in self.world.all_gather(found) for row in rows):
            by_video[number, numbers] = scores
            by_text[numbers, number] = scores
        return by_text.masked_fill(~of_texts, OUTSIDE), by_video.masked_fill(~wanted, OUTSIDE)


def preprocessing_of(model: VideoTextRetrieval, settings: RetrievalSettings) -> Preprocessing:
    """Return the model's preprocessing, changed by the settings; for one that has none, as of published files, upstream's.

    Raises ValueError for clips that the model does not take.
    """
    video = model.config.video
    upstream = Preprocessing(video.num_frames, video.img_size, "borders", short="last", crop="stretch")
    changed = settings.changed(model.preprocessing or upstream)
    if (changed.frames, changed.size) != (video.num_frames, video.img_size) or video.channels != 3:
        found = f"preprocessing has {changed.frames} frames of size {changed.size}, of 3 channels"
        takes = f"{video.num_frames} of {video.img_size} and {video.channels}"
        raise ValueError(f"{found}; allowed: {takes}, which the model takes")
    return changed
