"""A sweep whose numbers are made up after those of one H200, with every kind of ending in it."""

from collections.abc import Iterable
from pathlib import Path

from harness.records.finding import Finding
from harness.records.record import Record
from harness.records.speed import Entry, Point, Speed
from harness.runs.store import Run

GOOD = Finding("y", "l2", 1e-3, 4e-3, 1.0)
BAD = Finding("u.grad", "max", 6e-2, 2e-2, 1.0, (0, 3, 5))
FRAMES = (8, 32, 64, 128, 256, 512)
BOX = {
    "device": "cuda", "gpu": "NVIDIA H200", "driver": "570.1", "cpu": "a CPU", "packages": {"torch": "2.11.0"},
    "fingerprints": {"fused": "abc123"}, "settings": {"tf32": False}, "git": {"commit": "f00d", "dirty": False},
}  # fmt: skip
CEILINGS = {"copy": 4.23e12, "matmul": 795e12, "exp": 4.1e12}
ABSENT = [{"subject": "vit", "implementation": "flash", "role": "rival", "reason": "no <flash> here"}]


def taken(middle: float) -> tuple[float, ...]:
    """Nine samples around a middle."""
    return tuple(middle * (1 + 0.004 * n) for n in (-4, -2, -1, -1, 0, 1, 1, 2, 6))


def speed(entry: Entry, point: Point, ms: float, gib: float = 1.0, **rest) -> Speed:
    """A speed of so many milliseconds."""
    given = {"warm": (1.0, ms / 900), "stopped": "interval", "allocated": int(gib * 2**30), "reserved": int(gib * 2**31)}
    return Speed(entry, point, "ok", taken(ms / 1e3), **given | rest)


def clip(frames: int, race: str = "middle", mode: str = "infer", way: str = "eager", batch: int = 1) -> Point:
    """A model's point at 224 px."""
    return Point(race, (("B", batch), ("T", frames), ("S", 224), ("L", 1 + 196 * frames)), mode, way)


def models() -> Iterable[Speed]:
    """VideoMamba crosses the ViT when long, upstream's path does not; naive attention runs out of memory."""
    for race, vit, scale in (("middle", "base", 1.0), ("tiny", "tiny", 0.25)):
        ours, theirs = (
            Entry("videomamba", n, r, variant=race) for n, r in (("fused:native", "ours"), ("fused:mamba_ssm", "rival"))
        )
        naive, sdpa = (Entry("vit", n, "rival", variant=vit) for n in ("reference", "sdpa"))
        for mode, times in (("infer", 1), ("train", 3.6)):
            for way in ("eager", "graph"):
                for T in FRAMES:
                    point, L = clip(T, race, mode, way), 1 + 196 * T
                    floor = 10 * scale if way == "eager" else 0.5
                    yield speed(ours, point, times * scale * (floor + 1.3e-3 * L), times * (0.2 + 2e-5 * L * scale))
                    yield speed(theirs, point, times * scale * (18 + 5e-3 * L), times * (0.4 + 4.5e-4 * L * scale), wrong=2.6)
                    yield speed(sdpa, point, times * scale * (1.5 + 6e-4 * L + 7e-8 * L * L), times * (0.2 + 2.4e-5 * L))
                    if T < 128:
                        yield speed(naive, point, times * scale * (2 + 2.2e-6 * L * L), times * (0.2 + 6e-7 * L * L * scale))
                    else:
                        short = f"oom at {clip(128, race, mode, way).name} already"
                        status, why = ("oom", "CUDA out of memory") if T == 128 else ("implied", short)
                        yield Speed(naive, point, status, reason=why)


def operators() -> Iterable[Speed]:
    """A native scan that is gated in training, a rival, and a plain one."""
    shapes = [(8, 384, 1569), (8, 1152, 1569), (8, 1152, 2048), (1, 1152, 12545), (1, 1152, 12288), (64, 1152, 197)]
    for race, letter, factor in (("scan", "N", 1.0), ("scan-both", "N", 2.0), ("conv", "K", 0.2)):
        subject = race.partition("-")[0]
        names = ("fused:torch", "ours", 40.0), ("fused:native", "ours", 0.3), ("fused:mamba_ssm", "rival", 1.0)
        for B, E, L in shapes:
            for mode, times in (("infer", 1.0), ("train", 4.2)):
                point = Point(race, (("B", B), ("L", L), ("E", E), (letter, 16 if letter == "N" else 4)), mode)
                least = 4.8e-9 * B * E * L * times * factor
                for name, role, slow in names:
                    entry = Entry(subject, name, role)
                    if (name, race, mode) == ("fused:native", "scan", "train"):
                        why = "parity backward failed in B2-L197-E384-N16-bfloat16: u.grad is wrong by 3 budgets"
                        yield Speed(entry, point, "gated", reason=why)
                    else:
                        wrong = 2.6 if role == "rival" and race == "scan" else 0.0
                        yield speed(entry, point, least * slow * 8.1, 0.3, bound=least / 1e3, wrong=wrong)


def pieces() -> Iterable[Speed]:
    """Streams of three sizes, flat; chunks of a video that does not fit into memory as a whole in training, and of an hour."""
    sizes = (("B", 1), ("T", 1), ("S", 224), ("L", 196))
    for race, ms, mib in (("tiny", 1.1, 40), ("small", 1.2, 90), ("middle", 1.9, 240)):
        entry = Entry("videomamba", "fused:native", "ours", variant=race)
        for way, seen in (("eager", (8,)), ("graph", (8, 1000))):
            for n in seen:
                point = Point("stream", (*sizes, ("A", n)), "infer", way)
                yield speed(entry, point, ms * (9 if way == "eager" else 1), mib / 1024)
    entry = Entry("videomamba", "fused:native", "ours", variant="middle")
    for mode, times in (("infer", 1.0), ("train", 3.5)):
        whole = (("B", 1), ("T", 512), ("S", 224), ("L", 100353))
        for n in (8, 32, 128):
            point = Point("chunks", (*whole, ("F", n)), mode, "chunked")
            yield speed(entry, point, times * (320 + 900 / n), times * (1.5 + n / 32))
        if mode == "infer":
            yield speed(entry, Point("chunks", whole, mode, "eager"), 250.0, 8.0)
        else:
            point = Point("chunks", whole, mode, "checkpointed")
            yield Speed(entry, point, "oom", reason="CUDA out of memory")
    hour = (("B", 1), ("T", 3600), ("S", 224), ("L", 705601), ("F", 64))
    yield speed(entry, Point("chunks", hour, "infer", "chunked"), 2300.0, 9.0)


def records() -> list[Record]:
    """Licences: native's backward of the scan fails, so does a rival's forward."""
    case = "B2-L197-E384-N16-bfloat16"

    def record(status: str, check: str, name: str, role: str = "ours", subject: str = "scan") -> Record:
        findings = (GOOD,) if status == "pass" else (GOOD, BAD)
        command = f"python -m harness parity --grid full --subject {subject} --check {check} --impl {name} --case {case}"
        return Record(subject, name, role, check, case, "bfloat16", status, 1.5, findings=findings, command=command)

    return [
        record("pass", "forward", "fused:torch"), record("pass", "backward", "fused:torch"),
        record("pass", "forward", "fused:native"), record("fail", "backward", "fused:native"),
        record("fail", "forward", "fused:mamba_ssm", "rival"), record("pass", "forward", "sdpa", "rival", "vit"),
    ]  # fmt: skip


def made(folder: Path, speeds: Iterable[Speed], status: str = "finished", **about) -> Run:
    """A stored run."""
    plan = {"grid": "full", "device": "cuda", "races": [], "names": [], "budget": 2.0} | about.pop("plan", {})
    started = about.pop("started", None)
    given = {"kind": "bench", "plan": plan, "box": BOX, "absent": ABSENT, "ceilings": CEILINGS}
    run = Run.create(folder, given | {"command": "python -m harness bench"} | about)
    for record in records():
        run.add(record)
    for one in speeds:
        run.add_speed(one)
    run.finish(status)
    run.about["started"] = started or run.about["started"]
    return run
