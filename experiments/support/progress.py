"""Progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# 120 columns where the output is a file, so that the tables fit.
console = Console(width=None if Console().is_terminal else 120)


@contextlib.contextmanager
def progress_bar(description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Shows a bar while the block runs; yields a function that takes the steps done and an optional note.

    Args:
      description: shown before the bar.
      total: number of steps; None shows a spinner and the elapsed time.
    """
    if not console.is_terminal:
        console.print(description)
        yield lambda done, note="": console.print(f"{done}/{total} {note}") if note else None
        return
    count = [BarColumn(), MofNCompleteColumn()] if total else []
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        *count,
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=total, note="")
        yield lambda done, note="": progress.update(task, completed=done, **({"note": note} if note else {}))
