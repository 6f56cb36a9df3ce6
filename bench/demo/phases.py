"""Named, time-boxed phases with a progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Phase:
    """One phase in progress: counts its work and knows when its time is up."""

    def __init__(self, progress: Progress, name: str, total: int | None, box: float | None) -> None:
        self.name = name
        self.box = box
        self.note: str | None = None
        self._progress = progress
        self._task = progress.add_task(name, total=total)
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the phase began."""
        return time.perf_counter() - self._start

    def advance(self) -> None:
        """Count one piece of work."""
        self._progress.advance(self._task)

    def over(self) -> bool:
        """Whether the phase has used up its time."""
        return self.box is not None and self.seconds > self.box

    def stopped(self, done: int, wanted: int, unit: str) -> None:
        """Record that the phase ended with less work than wanted."""
        self.note = f"{self.name}: stopped at {done} of {wanted} {unit}, its {self.box:.0f} s were over"

    def close(self) -> None:
        """Remove the bar."""
        self._progress.remove_task(self._task)


class Phases:
    """The phases of one run, shown as they go; `seconds` and `notes` are kept for the report."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            # Drawing takes time from the two cores being measured.
            refresh_per_second=2,
        )

    def __enter__(self) -> Phases:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """Show a remark now and repeat it in the report."""
        self.notes.append(text)
        self.console.print(f"  {text}", highlight=False, markup=False)

    @contextmanager
    def phase(self, name: str, total: int | None = None, box: float | None = None) -> Iterator[Phase]:
        """Run one phase; a line with its time stays on the screen."""
        phase = Phase(self._progress, name, total, box)
        try:
            yield phase
        finally:
            phase.close()
        self.seconds[name] = phase.seconds
        self.console.print(f"[green]✓[/green] {name}  {phase.seconds:.1f} s", highlight=False)
        if phase.note:
            self.note(phase.note)
