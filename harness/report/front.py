"""The front page of all accepted runs: the newest numbers, how they moved from run to run, and which are of older code."""

from collections.abc import Mapping
from pathlib import Path

from harness.judge.registry import subjects
from harness.records.speed import Speed
from harness.report import (
    accepted,
    bench,
    curves,
    faults,
    glossary,
    headlines,
    html,
    overview,
    parity,
    race_numbers,
    speed_figures,
    things,
    words,
)  # fmt: skip
from harness.report.figures import Drawing, End, chart, label_ends, line_look, logarithmic, shown
from harness.report.html import Number, Page, Section
from harness.report.markdown import Markdown, escape, table
from harness.runs import freshness
from harness.runs.store import Run

STEM = "index"
LINES = 5  # of the trend
AGAIN = """\
From a checkout, on a machine with an NVIDIA GPU; every run's own page has its command and its commit:

```
pip install nox
nox -s parity
nox -s bench
python -m harness accept reports/runs/RUN
```"""


def write(folder: Path) -> Path:
    """Write index.html and trend.svg into `reports`, from the runs in its folder `accepted`; return the page's path."""
    runs = {path.parent: Run.open(path.parent) for path in sorted(folder.glob("accepted/*/*/run.json"))}
    newest = accepted.newest_races(runs)
    speeds = [s for where, run in runs.items() for s in faults.marked(run) if newest.get(s.point.race) == where]
    links = {race: where.relative_to(folder) for race, where in newest.items()}
    families, ages = curves.families(speeds), {where: freshness.changed_since(run) for where, run in runs.items()}
    judged = [run for run in _by_day(runs) if run.about["kind"] == "parity" and run.counts()["passed"]]
    largest = max(judged, key=lambda run: (run.counts()["passed"] > 1000, run.about["started"]), default=None)
    numbers, said = headlines.numbers(speeds, families)[:3], [headlines.sentence(speeds, families)]
    if largest:
        said.append(parity.in_short(largest))
        who = " and ".join(_names(largest))
        label = f"answers of {who} passed in the newest large parity run, {largest.about['started'][:10]}"
        numbers += [n._replace(label=label) for n in parity.numbers(largest)[:1]]
    older = sum(age != () for age in ages.values())
    numbers.append(Number(str(older), f"of {len(runs)}", "accepted runs are of older code; their list says what changed"))
    apart = accepted.sections(speeds, links, runs.values(), "report.html")
    rest = "\n".join([*overview.crossings(speeds), *overview.most_memory(speeds)])
    sections = [
        Section("Newest numbers", "\n\n".join([accepted.came_from(links, accepted.usual_races(), "report.html"),
                overview.overview(speeds)])),
        *([Section("Where VideoMamba meets the ViT, and memory", rest)] if rest else []),
        *([Section("Other families, loops and long videos", "\n\n".join(apart))] if apart else []),
        Section("How right", _right(runs, folder)),
        *([Section("From run to run", shown(drawn))] if (drawn := trend(runs, folder)) else []),
        Section("Accepted runs", _runs(runs, ages, folder)),
        Section("How to repeat it", AGAIN),
        Section("Glossary", glossary.terms(), folded=True),
    ]  # fmt: skip
    verdict, picture = " ".join(filter(None, said)), _picture(families, newest, folder)
    machines = dict.fromkeys(str(run.about["box"].get("gpu") or run.about["box"].get("cpu")) for run in runs.values())
    title = f"Mamba video models: what was measured on {', '.join(machines) or 'no machine yet'}"
    front = Page(title, verdict, numbers[: race_numbers.MOST], picture, sections)
    return html.write_html(folder, front, STEM)


def _names(run: Run) -> list[str]:
    """Return the implementations of ours that a parity run judged."""
    return [*dict.fromkeys(r.implementation for r in run.records if r.role == "ours" and r.status != "skip")]


def _picture(families: list[curves.Family], newest: Mapping[str, Path], folder: Path) -> str:
    """Return the main chart of the run that has it, with its caption there; "" without one."""
    main = headlines.main_family(families)
    if not main or not (path := newest[main.race] / f"{main.stem}.svg").exists():
        return ""
    drawing = speed_figures.latency(main, path.parent)
    return f"![{drawing.caption}](./{path.relative_to(folder)})"


def _right(runs: Mapping[Path, Run], folder: Path) -> str:
    """Return how many answers of ours passed in accepted parity runs, by subject and implementation.

    Those of a subject and an implementation are of the newest run that asked them.
    """
    found: dict[str, dict[str, str]] = {}
    used: dict[Path, None] = {}
    for where, run in sorted(runs.items(), key=lambda item: str(item[1].about["started"]), reverse=True):
        answers: dict[tuple[str, str], list[bool]] = {}
        for r in run.records if run.about["kind"] == "parity" else ():
            if r.role == "ours" and r.status != "skip" and r.implementation not in found.get(r.subject, {}):
                answers.setdefault((r.subject, r.implementation), []).append(r.status == "pass")
        for (subject, name), passed in answers.items():
            found.setdefault(subject, {})[name] = f"{sum(passed):,} of {len(passed):,}"
            used[where.relative_to(folder)] = None
    names = sorted({name for cells in found.values() for name in cells}, key=things.rank)
    rows = [[subject, *(cells.get(name, "-") for name in names)] for subject, cells in sorted(found.items())]
    parts = ["Answers of ours that passed, of those asked; each from the newest run that asked it."]
    parts += ["From " + ", ".join(f"[{where.name}]({where}/report.html)" for where in used) + ":"] * bool(used)
    parts += [table(["subject", *map(words.implementation, names)], rows)] if rows else []
    if missing := sorted(set(subjects()) - set(found)):
        parts.append(f"No accepted run asks about {', '.join(missing)} yet: whether they are right does not stand here.")
    return "\n\n".join(parts)


def trend(runs: Mapping[Path, Run], folder: Path) -> list[Drawing]:
    """Draw trend.svg: our times at the points that most benches share, the newest last; nothing before a second bench."""
    benches = [run for run in _by_day(runs) if run.about["kind"] == "bench"]
    names = [{s.point.name for s in run.speeds if s.seconds} for run in benches]
    benches = [run for run, mine in zip(benches, names, strict=True) if sum(bool(mine & other) for other in names) > 1]
    times: dict[str, dict[int, Speed]] = {}
    for place, run in enumerate(benches):
        for s in run.speeds:
            if s.seconds and s.entry.implementation == "fused:native":
                times.setdefault(s.point.name, {})[place] = s
    shared = sorted((name for name, line in times.items() if len(line) > 1), key=lambda n: (-len(times[n]), -max(times[n])))
    races: dict[str, str] = {}
    for name in shared:
        races.setdefault(next(iter(times[name].values())).point.race + next(iter(times[name].values())).point.mode, name)
    if not races:
        return []
    with chart(folder, "trend", width=6.4) as axes:
        ends = []
        for name, spare in zip(list(races.values())[:LINES], things.SPARE, strict=False):
            line = times[name]
            point = next(iter(line.values())).point
            look = things.Look(f"{words.point(point, with_way=True)}, {words.MODES[point.mode]}", *spare)
            axes.plot(list(line), [1e3 * curves.seconds(s) for s in line.values()], **line_look(look))
            ends.append(End(max(line), 1e3 * curves.seconds(line[max(line)]), look))
        axes.set(yscale="log", ylabel="ms a call, ours")
        days = [f"{run.about['started'][:10]}\n{run.folder.name[9:]}" for run in benches]
        axes.set_xticks(range(len(benches)), days, fontsize=6.5)
        axes.margins(y=0.15)
        logarithmic(axes.yaxis)
        label_ends(axes, ends, letters=24)
    return [Drawing(folder / "trend.svg", "Our medians at points that several accepted benches have timed, oldest run left.")]


def _by_day(runs: Mapping[Path, Run]) -> list[Run]:
    return sorted(runs.values(), key=lambda run: str(run.about["started"]))


def _runs(runs: Mapping[Path, Run], ages: Mapping[Path, tuple[str, ...] | None], folder: Path) -> str:
    """Return all accepted runs as a table, the newest first, each with its verdict and the age of its code."""
    rows = []
    for run in reversed(_by_day(runs)):
        where = next(place for place, other in runs.items() if other is run)
        link = Markdown(f"[{escape(where.name)}]({where.relative_to(folder)}/report.html)")
        box, said = run.about["box"], bench.verdict(run) if run.about["kind"] == "bench" else parity.verdict(run)
        day = run.about["started"][:10]
        narrowed = run.about.get("filtered") or any(run.about["plan"].get(key) for key in ("races", "points", "names"))
        kind = run.about["kind"] + ", a part" * bool(narrowed)
        rows.append((link, kind, day, box.get("gpu") or box.get("cpu"), said, freshness.in_words(ages[where])))
    return table(["run", "kind", "day", "on", "says", "its code"], rows)
