"""The command line: `python -m minirank.testing vectors FOLDER`, `… check FOLDER`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .vectors import check_results, write_vectors


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 if a result is wrong; 2 if the arguments or files are."""
    parser = argparse.ArgumentParser(
        prog="python -m minirank.testing", description="Golden vectors for other languages."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("vectors", "write inputs, outputs and PEFT adapters of mixed rank into FOLDER"),
        ("check", "judge the results in FOLDER, one NAME.json for each function"),
    ):
        commands.add_parser(name, help=text, description=text).add_argument("FOLDER", type=Path)
    given = parser.parse_args(arguments)
    if given.command == "vectors":
        counts = write_vectors(given.FOLDER)
        print(f"{sum(counts.values())} cases of {len(counts)} functions in {given.FOLDER}")
        return 0
    try:
        reports = check_results(given.FOLDER)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n\n".join(map(str, reports)))
    return 1 if any(report.failed for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
