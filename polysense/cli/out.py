"""What commands print: tables and JSON on stdout, progress and notes on stderr."""
from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

WIDE = 200                                           # columns where there is no terminal to ask


class Stopped(Exception):
    """The user interrupted; the message says how to go on."""


def console(error: bool = False) -> Any:
    """A rich console that neither wraps nor colours what is piped into a file."""
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    return Console(stderr=error, width=None if stream.isatty() else WIDE, highlight=False, soft_wrap=not stream.isatty())


def say(text: str = "") -> None:
    """A line of the answer."""
    console().print(text, markup=False)


def note(text: str) -> None:
    """A line about the work, not part of the answer."""
    console(error=True).print(text, style="dim", markup=False)


def json_out(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[str] = (), title: str | None = None) -> None:
    """Aligned columns; the first one never wraps."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, show_edge=False)
    for i, name in enumerate(columns):
        made.add_column(name, justify="right" if name in right else "left", no_wrap=i == 0, overflow="fold", style="bold" if i == 0 else None)
    for row in rows:
        made.add_row(*(Text("" if v is None else str(v)) for v in row))
    console().print(made)


def size(count: float) -> str:
    """1234567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def short(count: int) -> str:
    """Parameter counts as papers print them: 151277313 -> "151.3 M"."""
    for unit, by in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= by:
            return f"{count / by:.1f} {unit}"
    return str(count)


def clock(seconds: float) -> str:
    """75 -> "1:15"."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02d}"


class Bar:
    """Progress on stderr: a live bar in a terminal, else a plain line now and then. `bar(done, total, extra)`; a context manager."""

    def __init__(self, what: str, unit: str = "", every: float = 5.0, quiet: bool = False):
        self.what, self.unit, self.every, self.quiet = what, unit, every, quiet
        self.live, self.task, self.start, self.last, self.first = None, None, time.monotonic(), 0.0, None
        self.done = self.total = 0

    def __enter__(self) -> Bar:
        return self

    def __call__(self, done: int, total: int, extra: str = "") -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.start = done, now
        self.done, self.total = done, total
        if self.quiet:
            return
        if sys.stderr.isatty():
            self._draw(done, total, extra)
        elif done >= total or now - self.last >= self.every:
            self.last = now
            new, spent = done - self.first, now - self.start
            left = f", {clock((total - done) * spent / new)} left" if new and done < total else ""
            count = f"{done}/{total} {self.unit}".strip() if self.unit else f"{100 * done // max(1, total)} %"
            print(f"{self.what} {count}{'  ' + extra if extra else ''}{left}", file=sys.stderr, flush=True)

    def _draw(self, done: int, total: int, extra: str) -> None:
        if self.live is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            count = MofNCompleteColumn() if self.unit else TaskProgressColumn()
            self.live = Progress(TextColumn("{task.description}"), BarColumn(24), count, TimeElapsedColumn(), TextColumn("left"),
                                 TimeRemainingColumn(), TextColumn("{task.fields[extra]}", style="dim"), console=console(error=True))
            self.live.start()
            self.task = self.live.add_task(self.what, total=total, extra=extra)
        assert self.task is not None
        self.live.update(self.task, completed=done, total=total, extra=extra)

    def begin(self, what: str) -> None:
        """Something else is counted from here on, from the start."""
        self.what, self.first, self.last = what, None, 0.0
        if self.live is not None and self.task is not None:
            self.live.reset(self.task, description=what)

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self.live is not None:
            self.live.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()
