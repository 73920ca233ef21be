"""The newest accepted numbers of every race, for reports/README.md."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from harness.bench import grids
from harness.records.speed import Speed
from harness.report import curves, faults, loop, overview, reading, words
from harness.report.bench import split_videos
from harness.report.markdown import escape
from harness.runs import freshness
from harness.runs.store import Run

MARKERS = ("<!-- newest accepted bench -->", "<!-- end of newest accepted bench -->")


def refresh(page: Path, accepted: Path) -> None:
    """Put the numbers of accepted benches, the folders in `accepted`, between the markers of a page above them.

    Of every race they are those of the newest run that timed ours in it, at all points and with all rivals if there is one. A
    page without the markers stays as it is.
    """
    found = {path.parent: Run.open(path.parent) for path in sorted(accepted.glob("*/run.json"))}
    write(page, {folder.relative_to(page.parent): run for folder, run in found.items() if run.about["kind"] == "bench"})


def write(page: Path, runs: Mapping[Path, Run]) -> None:
    """Do what `refresh` does with runs by their folders, as the page links to them."""
    text = page.read_text(encoding="utf-8")
    if not all(marker in text for marker in MARKERS):
        return
    before, _, rest = text.partition(MARKERS[0])
    newest = newest_races(runs)
    speeds = [s for folder, run in runs.items() for s in faults.marked(run) if newest.get(s.point.race) == folder]
    families = curves.families(speeds)
    parts = [
        "\n".join(_source(folder, run, newest) for folder, run in runs.items() if folder in newest.values()),
        "\n".join([*overview.crossings(speeds), *overview.most_memory(speeds)]),
        *[f"![{f.title}]({newest[f.race]}/{f.stem}.svg)" for f in families if f.mode == "infer"][-1:],
        came_from(newest, usual_races()),
        overview.overview(speeds),
        *sections(speeds, newest, [*runs.values(), *reading.accepted_runs(page.parent / "accepted")]),
    ]
    inside = "\n\n".join([MARKERS[0], *parts, MARKERS[1]])
    page.write_text(before + inside + rest.partition(MARKERS[1])[2], encoding="utf-8")


def newest_races(runs: Mapping[Path, Run]) -> dict[str, Path]:
    """Return of every race the newest run that timed ours in it, at all points and with all rivals; without one at a part."""
    whole: dict[str, Path] = {}
    part: dict[str, Path] = {}
    for folder, run in sorted(runs.items(), key=lambda item: item[1].about["started"]):
        if run.about["kind"] == "bench":
            timed = {s.point.race for s in run.speeds if s.entry.role == "ours" and s.seconds}
            part |= dict.fromkeys(timed, folder)
            whole |= dict.fromkeys((race for race in timed if is_whole(run, race)), folder)
    return {race: (part | whole)[race] for race in grids.races() if race in part}


def is_whole(run: Run, race: str) -> bool:
    """Return whether no point and no rival of a race was left out by the run's options."""
    plan = run.about["plan"]
    return not plan.get("points") and (race in grids.races("videos") or not plan.get("names"))


def usual_races() -> list[str]:
    """Return the races whose times stand in one table: operators and models, but those beside which other models run."""
    apart = overview.raced_with_others()
    return [race for race in (*grids.races("operators"), *grids.races("models")) if race not in apart]


def sections(speeds: list[Speed], newest: Mapping[str, Path], trainings: Iterable[Run], file: str = "report.md") -> list[str]:
    """Return the paragraphs on all races that have tables of their own, with links to the `file` of the runs they come from."""
    parts = []
    for race in overview.raced_with_others():
        if race in newest:
            mine = [s for s in speeds if s.point.race == race]
            parts += [f"### {words.race(race)}", came_from(newest, [race], file), overview.beside_others(mine)]
            parts += ["Peak memory of a call in GiB:", overview.memory_beside_others(mine)]
    parts += [*_loops(speeds, newest, file), *_videos(speeds, newest, file), *_data(speeds, newest, trainings, file)]
    return parts


def _loops(speeds: list[Speed], newest: Mapping[str, Path], file: str) -> list[str]:
    """Return the section on a user's loops, with the run that its tables come from."""
    if loop.RACE not in newest:
        return []
    return ["### Loops, the host's time included", came_from(newest, [loop.RACE], file), loop.summary(speeds)]


def _videos(speeds: list[Speed], newest: Mapping[str, Path], file: str) -> list[str]:
    """Return a section for each race of streams or chunks, with the run that its table comes from."""
    parts = []
    for race in grids.races("videos"):
        if race in newest:
            [section] = split_videos([s for s in speeds if s.point.race == race])
            head, table = section.split("\n\n", 1)
            parts += [head, came_from(newest, [race], file), table]
    return parts


def _data(speeds: list[Speed], newest: Mapping[str, Path], trainings: Iterable[Run], file: str) -> list[str]:
    """Return the section on how fast videos are read, with the run that its table comes from."""
    if reading.RACE not in newest:
        return []
    mine = [s for s in speeds if s.point.race == reading.RACE]
    head, rest = reading.section(mine, reading.trained(trainings, mine)).split("\n\n", 1)
    return [head, came_from(newest, [reading.RACE], file), rest]


def came_from(newest: Mapping[str, Path], races: Iterable[str], file: str = "report.md") -> str:
    """Return a sentence with the folders that a table's numbers come from."""
    folders = dict.fromkeys(newest[race] for race in races if race in newest)
    return f"From {', '.join(f'[{folder.name}]({folder}/{file})' for folder in folders)}:" if folders else ""


def _source(folder: Path, run: Run, newest: Mapping[str, Path]) -> str:
    """Return a line that names the races of a run, its box, its day and its folder."""
    here = run.about["box"]
    races = [race + " (a part)" * (not is_whole(run, race)) for race in grids.races() if newest.get(race) == folder]
    day = run.about["started"][:10]
    code = f"its code, {str(run.about.get('commit', '?'))[:7]}, is {freshness.in_words(freshness.changed_since(run))}"
    box = escape(here.get("gpu") or here.get("cpu"))
    return f"- {', '.join(races)}: on one {box}, {day} ([report]({folder}/report.md)); {code}."
