"""The command line of the judge."""

import sys

import typer

from harness.cli.bench import bench
from harness.cli.evidence import make
from harness.cli.inspect import doctor, list_all
from harness.cli.learn import learn
from harness.cli.mutants import mutants
from harness.cli.parity import parity
from harness.cli.runs import accept, compare, report
from harness.cli.sanitize import sanitize
from harness.judge.request import UsageError
from harness.runs.conclude import USAGE
from harness.runs.store import StoreError

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
app.command("list")(list_all)
app.command("evidence")(make)
for command in (doctor, parity, bench, compare, learn, mutants, sanitize, report, accept):
    app.command()(command)


def main() -> None:
    """Run a command, turning wrong options into exit code 2 with one line that says what is allowed."""
    try:
        app()
    except (UsageError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE)
