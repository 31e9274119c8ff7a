"""`python -m train.report`: runs and evaluations side by side, as one page and as Markdown."""

from __future__ import annotations

if __name__ == "__main__":
    from train import start

    start.begin("python -m train.report")  # the imports below take a second

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from train import command_line
from train.flags import require, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Puts runs and evaluations side by side: a table, reliability diagrams, risk against coverage,
    curves of training, ECE against label smoothing, and how sure each number is.

    The page needs no network and no other file.
    """

    what: tyro.conf.Positional[
        Annotated[
            tuple[Path, ...],
            tyro.conf.arg(metavar="RUN|SWEEP|RESULT ...", help_behavior_hint="(required)"),
        ]
    ]
    """Folders of runs or of sweeps, and results of train.evaluate."""
    out: Annotated[Path, shown("FILE.html")] = Path("report.html")
    """The page; the Markdown lies beside it."""
    title: Annotated[str, shown("TEXT")] = "Accuracy and calibration"
    """The page's title."""

    def __post_init__(self) -> None:
        require(bool(self.what), "nothing to report: name runs, sweeps or results")
        require(self.out.suffix == ".html", f"--out must end in .html, not {self.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for a user's mistake."""
    try:
        options = command_line.read(ReportOptions, "python -m train.report", arguments)
        from train import files
        from train.evaluation import page, page_entries
        from train.run import folder as run_folder

        run_folder.check_place(options.out.parent)
        found, unfinished = page_entries.read(options.what)
        made = page.render(found, unfinished, options.title)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        for ending, content in made.items():
            files.write(options.out.with_suffix(f".{ending}"), content)
    except (ValueError, OSError) as error:
        print(f"python -m train.report: {command_line.said(error)}", file=sys.stderr)
        return 2
    for run in unfinished:
        print(f"not in the table: {run.name} ({run.status})", file=sys.stderr)
    print(f"{options.out} and .md, {len(found)} models")
    return 0


if __name__ == "__main__":
    sys.exit(main())
