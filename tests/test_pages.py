"""The pages: their Python runs, their commands exist, their links and names lead somewhere."""

import ast
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import extras
import pytest
import torch
from pages import ROOT, blocks_of

PAGES = (
    "README.md", "fused/README.md", "fused/ops/README.md", "harness/README.md", "CONTRIBUTING.md", "CHANGELOG.md",
    "reports/README.md",
)  # fmt: skip
MAX_NOT_RUN = 4  # of all pages
FILE = re.compile(r"# ((?:reference|fused|harness)/[\w/]+\.py)\n")  # the first line of a block that is a file of its own
MAX_README_LINES = 150
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
SESSIONS = {
    node.name: node
    for node in ast.parse((ROOT / "noxfile.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and any("session" in ast.unparse(d) for d in node.decorator_list)
}


def prose_of(page: str) -> str:
    """Return a page without its blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)


def commands_of(page: str) -> list[str]:
    """Return the commands in a page's shell blocks and inline code, without comments and prompts."""
    lines = [line for block in blocks_of(page) if block.language in ("", "bash") for line in block.text.splitlines()]
    inline = re.findall(r"`((?:nox|python -m|pip install|torchrun) [^`]+)`", prose_of(page))
    return [words for line in [*lines, *inline] if (words := line.partition(" #")[0].strip())]


COMMANDS = [(page, command) for page in PAGES for command in commands_of(page)]


@pytest.fixture
def added_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files that the pages add as examples, importable beside those of the packages, and an empty working folder."""
    files = {m[1]: block.text for page in PAGES for block in blocks_of(page) if (m := FILE.match(block.text))}
    for path, text in files.items():
        (tmp_path / "added" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "added" / path).write_text(text + "\n")
    folders = {path.rpartition("/")[0] for path in files}
    for folder in {str(Path(*Path(folder).parts[:2])) for folder in folders}:  # such as fused/ops
        package = importlib.import_module(folder.replace("/", "."))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / "added" / folder)])
    known, names = set(sys.modules), {path.removesuffix(".py").replace("/", ".") for path in files}
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield
    for name in set(sys.modules) - known:
        if name in names or any(other.startswith(name + ".") for other in names):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("added_files")
def test_python_blocks_run(page):
    """All blocks of a page, in order, in one namespace; marked ones only compile, files are imported by others."""
    namespace: dict[str, Any] = {"__name__": "page"}
    state = torch.random.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    try:
        for block in blocks_of(page):
            if block.language == "python":
                code = compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec")
                if not block.not_run and not block.extra and not FILE.match(block.text):
                    exec(code, namespace)
    finally:
        torch.random.set_rng_state(state[0])
        torch.use_deterministic_algorithms(state[1])


def test_few_blocks_are_not_run():
    skipped = [(page, block.line) for page in PAGES for block in blocks_of(page) if block.not_run]
    marks = sum(text.count("<!-- not run") for text in ((ROOT / page).read_text() for page in PAGES))
    assert len(skipped) == marks <= MAX_NOT_RUN  # every mark stands right above a block


def test_every_extra_is_installed_and_run_by_itself():
    """But for those that need a GPU. A mark stands right above a block and names an extra."""
    assert set(extras.RUNS) == {"base", *EXTRAS} - {"native", "power", "upstream"}
    marked = [block.extra for page in PAGES for block in blocks_of(page) if block.extra]
    marks = sum(len(re.findall("^<!-- extra:", (ROOT / page).read_text(), re.M)) for page in PAGES)
    assert len(marked) == marks and set(marked) <= set(extras.RUNS) - {"base"}
    assert re.search(r"^[^#\n]*\bnox -s extras\b", (ROOT / ".ci/run").read_text(), re.M)


def test_the_readme_is_short_and_names_what_ci_runs():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES
    shell = [block for block in blocks_of("README.md") if block.language == ""][0]
    sessions = re.findall(r"nox -s (\w+)", shell.text)
    assert sessions == ["parity", "tests"]
    assert all(re.search(rf"^nox -s {name}\b", (ROOT / ".ci/run").read_text(), re.M) for name in sessions)


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_commands_exist(page, command):
    """Sessions, subcommands, options and their values are known; `pip install` names extras that there are."""
    words = shlex.split(command)
    if words[0] == "nox":
        check_nox(words[1:])
    elif words[:2] == ["python", "-m"]:
        check_module(words[2], words[3:])
    elif words[0] == "torchrun":
        at = words.index("-m")
        check_module(words[at + 1], words[at + 2 :])
    elif words[:2] == ["pip", "install"]:
        asked = re.findall(r"\.\[(\w+(?:,\w+)*)\]", command)
        assert all(extra in EXTRAS for extras in asked for extra in extras.split(","))
        assert asked or words[2:] in (["nox"], ["-e", "."])
    else:
        assert words[0] in ("git", "cd"), f"{page}: {command!r} is of no known kind; add it to this test"


def check_nox(words: list[str]) -> None:
    """Check `[--no-venv] -s SESSION ... [-- ARGUMENTS]` against noxfile.py and against what the session calls."""
    own, _, rest = " ".join(map(shlex.quote, words)).partition(" -- ")
    flags = [word for word in shlex.split(own) if word.startswith("-")]
    assert set(flags) <= {"-s", "--no-venv"} and "-s" in flags
    names = shlex.split(own.partition("-s ")[2])
    assert names and all(name in SESSIONS for name in names), f"sessions are {', '.join(SESSIONS)}"
    if rest:
        calls = [node for node in ast.walk(SESSIONS[names[0]]) if isinstance(node, ast.Call)]
        own = [call for call in calls if ast.unparse(call.func) == "python"][-1]
        fixed = [argument.value for argument in own.args if isinstance(argument, ast.Constant)]
        check_module(fixed[1], [*fixed[2:], *shlex.split(rest)])


def check_module(module: str, arguments: list[str]) -> None:
    """Check the command line of `python -m MODULE`."""
    if module == "harness":
        check_harness(arguments)
    elif module == "fused.train":
        check_training(arguments)
    elif module in ("fused.chat", "fused.compile"):
        importlib.import_module(f"{module}.__main__").parser().parse_args(arguments)
    elif module in ("fused.evaluate", "fused.features", "fused.predict", "fused.search"):
        parser = importlib.import_module(f"{module}.__main__").parser()
        if arguments and arguments != ["--help"]:  # the name alone stands in prose
            parser.parse_intermixed_args(arguments)
    else:
        assert module in ("pytest", "mypy", "ruff")
        assert all((ROOT / word).exists() for word in arguments if word.startswith(("tests", "fused", "harness", "reference")))


def check_harness(arguments: list[str]) -> None:
    """Parse the words as typer does, without running the command, and look up the names among them."""
    from typer.main import get_command

    from harness.bench import grids
    from harness.cli.app import app
    from harness.judge import registry
    from harness.judge.check import checks

    known = {
        "--subject": registry.subjects(), "--check": checks(), "--mutant": registry.mutants(), "--race": grids.races(),
    }  # fmt: skip
    if not arguments:
        return
    group: Any = get_command(app)
    command = group.commands[arguments[0]]
    if len(arguments) == 1:  # also the bare name in a sentence, of a command that needs arguments
        return
    context = command.make_context(arguments[0], list(arguments[1:]))
    for parameter in command.params:
        given, option = context.params[parameter.name], parameter.opts[0]
        for name in given if isinstance(given, list | tuple) else [given] if given else []:
            assert option not in known or name in known[option], f"{option} {name} is unknown"


def check_training(arguments: list[str]) -> None:
    """Check options against the parser's source and `key=value` against the configuration."""
    from fused.train.config import TrainConfig, flatten
    from fused.train.config_sections import DataConfig

    options = re.findall(r'add_argument\("(--[\w-]+)"', (ROOT / "fused/train/__main__.py").read_text())
    keys = flatten(TrainConfig(task="finetune", out="out", steps=1, data=DataConfig(train="train", val="val")))
    for word in arguments:
        key, equals, _ = word.partition("=")
        if word.startswith("--"):
            assert word in options
        elif equals:
            assert key in keys


def test_the_training_configuration_is_accepted(tmp_path):
    """The YAML block of the user guide, read as the command reads it."""
    from fused.train.config_file import read_config

    [block] = [block for block in blocks_of("fused/README.md") if block.language == "yaml"]
    (tmp_path / "run.yaml").write_text(block.text)
    assert read_config(tmp_path / "run.yaml", ["optim.lr=2e-4"]).optim.lr == 2e-4


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose_of(str(found.resolve().relative_to(ROOT))), re.M)
            assert anchor in map(slug, headings), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_names_in_code_exist(page):
    """Dotted names such as `fused.backends.BACKENDS` resolve; paths such as `harness/judge/` are there."""
    text = prose_of(page)
    if page == "CHANGELOG.md":  # the first column of its tables has names of before
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.M)
    code = re.findall(r"`([^`\n]+)`", text)
    for name in {n for words in code for n in re.findall(r"(?<![\w./-])(?:fused|reference|harness)(?:\.[A-Za-z_]\w*)+", words)}:
        assert resolves(name), f"{page}: {name}"
    for path in {p for words in code for p in re.findall(r"^(?:fused|reference|harness|tests|reports)/[\w./-]*$", words)}:
        assert path.startswith("reports/runs") or (ROOT / path).exists(), f"{page}: {path}"


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_are_named_exist(page):
    """`test_load.py::test_round_trip` and `test_round_trip` behind it are tests of that file."""
    for row in (ROOT / page).read_text().splitlines():
        tests: set[str] = set()
        for words in re.findall(r"`([^`]+)`", row):
            file, _, name = words.rpartition("::")
            if file:
                sources = list((ROOT / "tests").rglob(file.rpartition("/")[2]))
                assert sources, f"{page}: {file}"
                tests = {n for source in sources for n in re.findall(r"^def (test_\w+)", source.read_text(), re.M)}
            if re.fullmatch(r"test_\w+", name):
                assert name in tests, f"{page}: {words}"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or attributes of one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def test_measured_numbers_are_those_of_the_run():
    """Every number of the README's table stands in the report that the section names."""
    section = (ROOT / "README.md").read_text().partition("## Measured")[2].partition("\n## ")[0]
    [run] = set(re.findall(r"\]\((reports/accepted/[\w/-]+/report\.md)\)", section.partition("\n|")[0]))
    report = (ROOT / run).read_text()
    rows = [line.split("|")[2:-1] for line in section.splitlines() if line.startswith("|") and "---" not in line][1:]
    numbers = [word for row in rows for cell in row for word in re.findall(r"\d[\d.,]*\d|\d", cell)]
    assert len(numbers) > 40
    missing = [number for number in numbers if not re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d.]|,\d)", report)]
    assert not missing
