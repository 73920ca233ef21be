"""The evaluation of a model on a list of videos, in one process or several.

    results = evaluate("runs/first/model", "videos/val", "runs/first/test", Settings(views=4, crops=3))
    print(results.numbers["top1"])
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from fused.backends import check_can_run
from fused.evaluate.confusion import draw_confusion
from fused.evaluate.predictions import Line, PredictionFile, weights_digest
from fused.evaluate.protocols import TARGET_PROTOCOLS
from fused.evaluate.results import TOP, Results, classes_csv, confusion_csv, summarise
from fused.evaluate.settings import Settings
from fused.evaluate.videos import Labelled, VideoViews, list_classified, list_targets
from fused.io.atomic_write import NotWritten, atomic_write
from fused.io.file_state import file_state
from fused.models.videomamba.classify import (
    check_fits,
    check_one_answer,
    class_names,
    merge_views,
    preprocessing_of,
    read_class_names,
    view_logits,
)
from fused.models.videomamba.model import VideoMamba
from fused.rules import invalid
from fused.terminal import Terminal, clock
from fused.train.data.batches import batches
from fused.train.interrupt import Interrupt
from fused.train.parallel import World, choose_device
from fused.train.prefetch import Prefetcher

PROGRESS_EVERY = 10.0  # seconds between lines of progress where none can be overwritten

_log = logging.getLogger("fused")


class NotFinite(RuntimeError):
    """The error for outputs of a model that are NaN or infinite; the message names the video."""


class Evaluation:
    """The evaluation of a model, from what its folder `out` holds already to its results. Without `out` nothing is written.

    `model` is a `VideoMamba`, a folder that `save_pretrained` wrote, or a name in `fused.PRETRAINED`. Every process of `world`
    makes one. A model that is passed goes to the world's device, without a world it stays on its own, and to eval mode, and
    gets `settings.labels`. One that is loaded goes to `settings.device` then.

    Raises ValueError or TypeError for a model, data or settings that do not go together, BackendError for a backend that cannot
    run on the device, NotWritten, an OSError, for a full disk, and what loading raises.
    """

    def __init__(
        self, model: VideoMamba | str | Path, data: str | Path, out: str | Path | None = None,
        settings: Settings | None = None, world: World | None = None,
    ) -> None:  # fmt: skip
        self.settings = settings = settings or Settings()
        if isinstance(model, str | Path):
            world, model = world or World(choose_device(settings.device)), load_model(model, settings)
        self.model = check_one_answer(model)
        if settings.labels is not None:
            self.model.labels = tuple(read_class_names(settings.labels))
        self.world = world or World(self.model.cls_token.device)
        check_can_run(self.model.requested_backend, self.world.device)
        self.model.to(self.world.device).eval()
        self.views = settings.chosen_views()
        self.preprocessing = replace(preprocessing_of(self.model), **settings.preprocessing())
        check_fits(self.preprocessing, self.model.config)
        self.views.check(self.preprocessing)
        self.is_regression = self.model.config.num_classes == 1
        if settings.protocol in TARGET_PROTOCOLS and not self.is_regression:
            outputs = self.model.config.num_classes
            raise invalid("protocol", settings.protocol, f"for a model of one output; this one has {outputs} classes")
        self.videos, self.notes = self._list(data)
        self.out = Path(out) if out is not None else None
        self.file = self._open()

    def run(self, interrupt: Interrupt | None = None, terminal: Terminal | None = None) -> Results | None:
        """Return the results, the same in all processes, or None if any process was interrupted before the end.

        Videos that were finished before, and whose files have not changed since, are not read again; files that could not be
        read are tried again. With `terminal`, of the main process, the progress and every file that gives no clip are printed.
        Raises NotWritten, an OSError, for a full disk, and NotFinite.
        """
        states = {video.path: file_state(video.path) for video in self.videos if self.world.is_main}  # before any is read
        done: dict[str, Line]
        done, self._states = self.world.all_gather((self.file.done if self.file is not None else {}, states))[0]
        lines = {str(v.path): done[str(v.path)] for v in self.videos if self._is_of(done.get(str(v.path)), v)}
        pending = [video for video in self.videos if str(video.path) not in lines]
        progress = Progress(terminal, len(self.videos), len(lines)) if terminal is not None else None
        again = sum(str(video.path) in done for video in pending)
        if progress is not None and (lines or again):
            changed = f"; {again} whose file or label has changed since are read again" if again else ""
            progress.terminal.print_line(f"{len(lines)} of {len(self.videos)} videos were finished before{changed}")
        try:
            for step in self._steps(pending):
                gathered = self.world.all_gather((step, interrupt is not None and interrupt.requested))
                new = [line for rank_lines, _ in gathered for line in rank_lines]
                lines |= {line["video"]: line for line in new}
                if self.file is not None:
                    self.file.add(new)
                if progress is not None:
                    progress.add(new)
                if any(requested for _, requested in gathered) and len(lines) < len(self.videos):
                    return None
            ordered = [lines[str(video.path)] for video in self.videos]
            results = summarise(ordered, None if self.is_regression else class_names(self.model))
            if self.file is not None:
                self.file.finish(ordered)
                self._write(results)
            return results
        finally:
            if self.file is not None:
                self.file.close()
            if progress is not None:
                progress.terminal.end_line()

    def _steps(self, videos: Sequence[Labelled]) -> Iterator[list[Line]]:
        """Yield this process's lines of each step; all processes have equally many steps."""
        if not videos:
            return
        options, settings, world = self.views, self.settings, self.world
        # windows make another number of views of every video, which cannot be stacked with those of others
        together = 1 if options.windows else max(1, settings.batch_size // (options.clips * options.crops))
        dataset = VideoViews(videos, self.preprocessing, options, settings.frame_pattern)
        every = batches(
            dataset, together, epoch=0, seed=0, workers=settings.workers, rank=world.rank, world=world.size, shuffle=False,
            drop_last=False,
        )  # fmt: skip
        place = {str(video.path): video for video in videos}
        for batch in Prefetcher(iter(every), world.device):
            lines = [self._bad(place[file.path], file.sentence, file.too_short) for file in batch.bad_files]
            for index, outputs in zip(batch.indices.tolist(), self._outputs(batch.clips), strict=True):
                lines.append(self._line(videos[index], outputs))
            yield lines

    @torch.no_grad()
    def _outputs(self, clips: Tensor) -> list[Tensor]:
        """Return the outputs (V, num_classes) of the views of each video, float32 on the CPU, for clips (B, V, C, T, H, W)."""
        if not len(clips):
            return []
        precision, device = getattr(torch, self.settings.precision), self.world.device.type
        with nullcontext() if precision == torch.float32 else torch.autocast(device, precision):
            parts = [view_logits(self.model, part) for part in clips.flatten(0, 1).split(self.settings.batch_size)]
        return list(torch.cat(parts).float().cpu().unflatten(0, clips.shape[:2]))

    def _line(self, video: Labelled, outputs: Tensor) -> Line:
        """Return the line of a video, for the outputs (V, num_classes) of its views. Raises NotFinite."""
        if not outputs.isfinite().all():
            wrong = f"{video.path}: the model's outputs are not finite in {self.settings.precision}"
            raise NotFinite(f"{wrong}; allowed: other weights, or precision=float32")
        if self.is_regression:
            return {**self._known(video), "output": float(outputs.mean()), "views": len(outputs)}
        probabilities, names = merge_views(outputs), class_names(self.model)
        best = probabilities.topk(min(TOP, len(names)))
        top = [[names[i], p] for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        return {**self._known(video), "top": top, "views": len(outputs)}

    def _bad(self, video: Labelled, sentence: str, too_short: bool) -> Line:
        """Return the line of a file that gave no clip."""
        return {**self._known(video), "error": sentence, "too_short": too_short}

    def _known(self, video: Labelled) -> Line:
        """Return what a line says of a video before it is read: the list's words, and the state of the file."""
        kind, label = ("target", video.label) if self.is_regression else ("label", class_names(self.model)[int(video.label)])
        state = self._states[video.path]
        frames = {} if video.stated_frames is None else {"frames": video.stated_frames}
        return {"video": str(video.path), kind: label} | frames | (state._asdict() if state is not None else {})

    def _is_of(self, line: Line | None, video: Labelled) -> bool:
        """Return whether a line from before is of this video as the list and the file are now."""
        if line is None:
            return False
        answers = ("top", "output", "views")
        return {key: value for key, value in line.items() if key not in answers} == self._known(video)

    def _list(self, data: str | Path) -> tuple[list[Labelled], tuple[str, ...]]:
        """Return the videos and notes on them. Raises ValueError for data that the model has no classes for."""
        settings = self.settings
        if self.is_regression:
            return list_targets(data, settings.target_mean, settings.target_std, **settings.listing())
        try:
            images = self.preprocessing.frames is None
            return list_classified(data, class_names(self.model), images, **settings.listing())
        except ValueError as error:
            unnamed = self.model.labels is None and "class" in str(error)
            advice = "; the model has no class names, labels=FILE gives some" if unnamed else ""
            raise ValueError(f"data: {error}{advice}") from error

    def _open(self) -> PredictionFile | None:
        """Return the file of the main process. Raises in all processes if it cannot be opened: NotWritten, else ValueError."""
        file, error = None, None
        if self.out is not None and self.world.is_main:
            try:
                file = PredictionFile(self.out, self._description())
            except (ValueError, OSError) as problem:
                error = problem
        kind, text = self.world.all_gather((NotWritten if isinstance(error, NotWritten) else ValueError, str(error or "")))[0]
        if text:
            raise kind(text) from error
        return file

    def _description(self) -> Line:
        """Return what the predictions depend on."""
        names = {"labels": list(self.model.labels or ())}
        targets = {key: getattr(self.settings, key) for key in ("target_mean", "target_std")} if self.is_regression else names
        return {
            "model": asdict(self.model.config), "weights": weights_digest(self.model), "views": asdict(self.views),
            "preprocessing": asdict(self.preprocessing), "frame_pattern": self.settings.frame_pattern,
            "precision": self.settings.precision, **targets,
        }  # fmt: skip

    def _write(self, results: Results) -> None:
        """Write results.json, and of classes classes.csv, confusion.csv and, with matplotlib, confusion.png."""
        assert self.out is not None
        files = {"results.json": json.dumps(results.numbers, indent=2) + "\n"}
        if results.classes:
            files |= {"classes.csv": classes_csv(results), "confusion.csv": confusion_csv(results)}
        for name, text in files.items():
            with atomic_write(self.out / name) as draft:
                draft.write_text(text, encoding="utf-8")
        if results.classes:
            try:
                draw_confusion(results, self.out / "confusion.png")
            except ImportError as error:
                _log.warning("confusion.png is not written: %s", error)


class Progress:
    """The progress of work on videos on the terminal, with the time that is left."""

    def __init__(self, terminal: Terminal, total: int, done_before: int, what: str = "video") -> None:
        self.terminal, self.total, self.before, self.what = terminal, total, done_before, what
        self.done, self.start = 0, time.perf_counter()
        self._shown = self.start

    def add(self, lines: Sequence[Line]) -> None:
        """Count the videos of a step, and name the files that gave no clip."""
        self.done += len(lines)
        for line in lines:
            if "error" in line:
                self.terminal.print_line(f"left out {line['error']}")
        now, position = time.perf_counter(), min(self.before + self.done, self.total)
        if not self.terminal.overwrites and now - self._shown < PROGRESS_EVERY and position < self.total:
            return
        self._shown, rate = now, self.done / (now - self.start)
        left = clock((self.total - position) / rate) if self.done else "?"
        self.terminal.print_progress(f"{self.what} {position}/{self.total}: {rate:.3g} videos/s, {left} left")


def load_model(source: str | Path, settings: Settings) -> VideoMamba:
    """Return the classifier of a folder or a published name, for the settings' frames and size. Raises what loading raises."""
    return VideoMamba.from_pretrained(source, backend=settings.backend, **settings.model_fields())


def evaluate(
    model: VideoMamba | str | Path, data: str | Path, out: str | Path | None = None, settings: Settings | None = None
) -> Results:
    """Return the results of a model on the videos of a folder or list, as `python -m fused.evaluate` does in one process.

    Arguments and errors are those of `Evaluation`.
    """
    results = Evaluation(model, data, out, settings).run()
    assert results is not None  # nothing interrupts it
    return results
