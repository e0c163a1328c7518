"""Progress bars on the terminal; plain lines where the output is none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# Wide enough for the tables even where the output is a file.
console = Console(width=None if Console().is_terminal else 120)


@contextlib.contextmanager
def progress_bar(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Shows a bar while the block runs; yields the function that sets how much is done, and what is said of it.

    Args:
      what: shown before the bar.
      total: steps until it is done; None shows only that time passes.
    """
    if not console.is_terminal:
        console.print(what)
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
        task = progress.add_task(what, total=total, note="")
        yield lambda done, note="": progress.update(task, completed=done, **({"note": note} if note else {}))
