"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Names = list[str] | None
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; by default the first GPU if there is one, else the CPU")]
Out = Annotated[Path | None, typer.Option(help="folder of the run; by default a new one under reports/runs")]
Resume = Annotated[
    bool, typer.Option("--resume", help="continue the newest unfinished run of this command, or the one in --out")
]
