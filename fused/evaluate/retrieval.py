"""The evaluation of a video-text model on a file of captions: text to video, video to text, or multiple choice.

Of texts, each caption of the file is one; of videos, each path. R@k is the share of queries, in percent, that have a right
answer among the first k. A video that cannot be read is no candidate, and counts as never found.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused.evaluate.retrieval_settings import RetrievalSettings
from fused.evaluate.run import Progress
from fused.evaluate.video_text import Engine
from fused.io.atomic_write import atomic_write
from fused.models.retrieval.model import VideoTextRetrieval
from fused.models.retrieval.ranking import RECALLS, both_directions, dual_softmax, ranks
from fused.models.retrieval.words import clean_text
from fused.terminal import Terminal
from fused.train.data.batches import BadFile, UnreadableFiles
from fused.train.data.captions import Captioned, read_captions
from fused.train.interrupt import Interrupt
from fused.train.parallel import World, choose_device

MATCHING_SHARE = 0.7  # of a choice's score; the rest is that of its cosine, as upstream weighs them


@dataclass(frozen=True)
class Results:
    """The results of an evaluation; prints as a table."""

    numbers: dict[str, Any]
    queries: list[dict[str, Any]]  # for each text its rank and the video that was found first; or each choice

    def __str__(self) -> str:
        numbers = self.numbers
        lost = "videos were read; the others count as never found"
        lines = [f"{numbers['read']} of {numbers['videos']} {lost}"] if numbers["read"] < numbers["videos"] else []
        if "accuracy" in numbers:
            return "\n".join([*lines, f"multiple choice: {numbers['accuracy']:.2f} % of {numbers['questions']} are right"])
        counts = f"{numbers['texts']} texts", f"{numbers['read']} videos"
        for direction, (queries, candidates) in (("text to video", counts), ("video to text", counts[::-1])):
            for kind, found in numbers[direction.replace(" ", "_")].items():
                shares = "".join(f"R@{k} {found[f'r{k}']:6.2f}  " for k in RECALLS if f"r{k}" in found)
                what = f"{direction}, {queries} among {candidates}, by {kind}"
                lines.append(f"{what:62} {shares}median rank {found['median_rank']:g}")
        return "\n".join(lines + [f"note: {note}" for note in numbers["notes"]])


class RetrievalEvaluation:
    """The evaluation of a model, from the features that its folder `out` holds already to its results.

    Every process of `world` makes one; without a world a model that is passed stays on its device, and one that is loaded goes
    to `settings.device`. Raises ValueError for captions or settings that do not go together, BackendError for a backend that
    cannot run on the device, CheckpointError, FileNotFoundError and ImportError for what cannot be loaded.
    """

    def __init__(
        self, model: VideoTextRetrieval | str | Path, data: str | Path, out: str | Path,
        settings: RetrievalSettings | None = None, world: World | None = None,
    ) -> None:  # fmt: skip
        self.settings = settings = settings or RetrievalSettings()
        found = read_captions(data, settings.prefix, settings.paragraph)
        self.entries, self.notes = found.entries, list(found.notes)
        answers = [entry.answer is not None for entry in self.entries]
        if any(answers) != all(answers):
            raise ValueError(f"{data} has an answer in {sum(answers)} of {len(answers)} entries; allowed: in all, or in none")
        self.is_choice = all(answers)
        if isinstance(model, str | Path):
            world = world or World(choose_device(settings.device))
            model = VideoTextRetrieval.from_pretrained(model, **settings.model_fields())
        self.world, self.out = world or World(model.device), Path(out)
        self.engine = Engine(model, settings, self.out, self.world)
        self.videos = list(dict.fromkeys(path for entry in self.entries for path in entry.paths))

    def run(self, interrupt: Interrupt | None = None, terminal: Terminal | None = None) -> Results | None:
        """Return the results, the same in all processes, or None if any was interrupted before the features were complete.

        Features that were made before are not made again. Raises NotWritten, an OSError, for a full disk,
        NotFinite, and UnreadableFiles if no video can be read.
        """
        bad: list[BadFile] = []
        missing = len([v for v in self.videos if not self.engine.store.has(v)])
        progress = Progress(terminal, len(self.videos), len(self.videos) - missing) if terminal is not None else None
        for done, unread in self.engine.encode_videos(self.videos):
            bad += unread
            if progress is not None:
                progress.add([{"video": str(v)} for v in done] + [{"error": file.sentence} for file in unread])
            if self.world.any(interrupt is not None and interrupt.requested):
                return None
        if terminal is not None:
            terminal.end_line()
        left_out = {Path(file.path) for file in bad}
        readable = [video for video in self.videos if video not in left_out]
        if not readable:
            raise UnreadableFiles(f"none of {len(self.videos)} videos can be read: {bad[0].sentence}")
        results = self._choices(readable) if self.is_choice else self._rank(readable, terminal)
        if self.world.is_main:
            files = {"results.json": json.dumps(results.numbers, indent=2) + "\n"}
            files["queries.jsonl"] = "".join(json.dumps(query) + "\n" for query in results.queries)
            for name, text in files.items():
                with atomic_write(self.out / name) as draft:
                    draft.write_text(text, encoding="utf-8")
        return results

    def _rank(self, videos: list[Path], terminal: Terminal | None) -> Results:
        """Return the ranks of all right answers among the videos that can be read. With `terminal` matching has a progress."""
        texts, answers = self._texts()
        place = {video: number for number, video in enumerate(videos)}
        right = torch.zeros(len(texts), len(videos), dtype=torch.bool)
        for number, paths in enumerate(answers):
            right[number, [place[path] for path in paths if path in place]] = True
        features = self.engine.encode_texts(texts)
        similarities = self.engine.cosines(videos, features)
        by_text, by_video = {"cosine": similarities.T}, {"cosine": similarities}
        if self.settings.dual_softmax:
            temperature = self.engine.model.temp.item()
            by_text["dual softmax"] = dual_softmax(similarities.T, temperature)
            by_video["dual softmax"] = dual_softmax(similarities, temperature)
        if self.settings.rerank:
            kind = f"matching of {self.settings.rerank}"
            progress = Progress(terminal, len(videos), 0, "matching of video") if terminal is not None else None
            tell = (lambda _: progress.add([{}] * self.world.size)) if progress is not None else None
            by_text[kind], by_video[kind] = self.engine.rerank(videos, features, similarities, self.settings.rerank, tell)
            if terminal is not None:
                terminal.end_line()
        unread = len(self.videos) - len(videos)
        found = {kind: both_directions(by_text[kind], by_video[kind], right, unread) for kind in by_text}
        numbers = {
            "videos": len(self.videos), "read": len(videos), "texts": len(texts),
            "text_to_video": {kind: first for kind, (first, _) in found.items()},
            "video_to_text": {kind: second for kind, (_, second) in found.items()},
            "notes": [*self.notes, *self._few(len(texts), len(videos))],
        }  # fmt: skip
        scores = list(by_text.values())[-1]
        return Results(numbers, _queries(texts, answers, videos, scores, right))

    def _texts(self) -> tuple[list[str], list[tuple[Path, ...]]]:
        """Return the texts, and the right videos of each."""
        texts: list[str] = []
        answers: list[tuple[Path, ...]] = []
        known: dict[str, int] = {}
        repeated = 0
        for entry in self.entries:
            for caption in entry.captions:
                first = known.setdefault(clean_text(caption), len(texts))
                repeated += first < len(texts) and not set(entry.paths) <= set(answers[first])
                if first < len(texts) and self.settings.merge_captions:
                    answers[first] = tuple(dict.fromkeys((*answers[first], *entry.paths)))
                    continue
                texts.append(caption)
                answers.append(entry.paths)
        if repeated and not self.settings.merge_captions:
            self.notes.append(
                f"{repeated} captions are of several videos, and only one of these counts as right for each; "
                "merge_captions=true makes them one text"
            )
        return texts, answers

    def _few(self, texts: int, videos: int) -> list[str]:
        """Return a sentence on the k that are no question, since there are no more candidates."""
        notes = []
        for what, count in (("videos", videos), ("texts", texts)):
            if without := [f"R@{k}" for k in RECALLS if k >= count]:
                notes.append(f"{', '.join(without)} are left out where there are {count} {what} to choose from")
        return notes

    def _choices(self, videos: list[Path]) -> Results:
        """Return the accuracy of the multiple choice, in percent of all questions."""
        readable, queries = set(videos), []
        mine = range(self.world.rank, len(self.entries), self.world.size)
        for number in mine:
            entry = self.entries[number]
            query = {"video": str(entry.paths[0]), "answer": entry.answer, "chosen": None}
            if entry.paths[0] in readable:
                query["chosen"] = int(self._choice_scores(entry).argmax())
            queries.append((number, query))
        gathered = [query for part in self.world.all_gather(queries) for query in part]
        ordered = [query for _, query in sorted(gathered, key=lambda pair: pair[0])]
        right = sum(query["chosen"] == query["answer"] for query in ordered)
        accuracy = round(100 * right / len(ordered), 2)
        numbers = {"videos": len(self.videos), "read": len(videos), "questions": len(ordered), "accuracy": accuracy}
        return Results(numbers | {"notes": self.notes}, ordered)

    @torch.no_grad()
    def _choice_scores(self, entry: Captioned) -> Tensor:
        """Return the scores (n,) of the captions of a question: of matching, and of cosines, each a softmax."""
        engine, model = self.engine, self.engine.model
        texts = engine.encode_texts(entry.captions)
        near = (engine.cosines(entry.paths[:1], texts)[0] / model.temp.item()).softmax(dim=0)
        matches = engine.match(entry.paths[0], texts, torch.arange(len(near))).softmax(dim=1)[:, 1]
        return MATCHING_SHARE * matches + (1 - MATCHING_SHARE) * near


def _queries(
    texts: Sequence[str], answers: Sequence[tuple[Path, ...]], videos: Sequence[Path], scores: Tensor, right: Tensor
) -> list[dict[str, Any]]:
    """Return for each text its right videos, the rank of the best, from 1 (None: none can be read), and what came first."""
    answered = right.any(dim=1)
    found = torch.full((len(texts),), -1)
    found[answered] = ranks(scores[answered], right[answered])
    best = scores.shape[1] - 1 - scores.flip(1).argmax(dim=1)
    places = [rank + 1 if rank >= 0 else None for rank in found.tolist()]
    firsts = [str(videos[i]) for i in best.tolist()]
    return [
        {"text": text, "videos": [str(path) for path in paths], "rank": place, "first": first}
        for text, paths, place, first in zip(texts, answers, places, firsts, strict=True)
    ]


def evaluate_retrieval(
    model: VideoTextRetrieval | str | Path, data: str | Path, out: str | Path, settings: RetrievalSettings | None = None
) -> Results:
    """Return the results of a video-text model on a file of captions, as `python -m fused.evaluate --task retrieval` does.

    Arguments and errors are those of `RetrievalEvaluation`.
    """
    results = RetrievalEvaluation(model, data, out, settings).run()
    assert results is not None  # nothing interrupts it
    return results
