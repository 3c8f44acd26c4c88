"""What the commands of every part have in common: how they print a table, and how they end when something is wrong."""

from __future__ import annotations

import sys
from typing import Annotated, Any, NoReturn

import typer

__all__ = ["JsonOption", "fail", "print_rows"]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def fail(message: str, status: int = 2) -> NoReturn:
    """End the command with one line on standard error."""
    print(f"tinytorch: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(status)


def print_rows(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table that wraps to the terminal's width."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table: Any = Table(*headers, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
