"""What a user sees while a verb works, all of it on stderr: progress bars and single lines."""

import contextlib
import glob
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")
LINE_EVERY = 60  # seconds between two lines of a bar where there is no terminal
# Without a TPU, libtpu (which preflight brings) asks nobody which TPU this is, and tells nothing of it.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is there to be shared
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
console = Console(stderr=True, highlight=False)


class _Rate(ProgressColumn):
    def render(self, task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "", style="dim")


@contextlib.contextmanager
def bar(what: str, total: int | None, done: int = 0) -> Iterator:
    """Shows a progress bar; yields a function `advance(n=1, note="")`.

    Without a terminal it prints a line every minute and one at the end.

    Args:
      what: the name of the work.
      total: the number of steps; None if unknown.
      done: the number of steps that are done already.
    """
    columns = (  # with a note, 80 characters wide
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("[dim]{task.fields[note]}"),
    )
    # Drawing takes time of a processor that may be training: once a second, and only where it is seen.
    seen = console.is_terminal
    with Progress(*columns, console=console, refresh_per_second=1, auto_refresh=seen) as progress:
        task = progress.add_task(what, total=total, completed=done, note="")
        told = time.monotonic()

        def advance(n: int = 1, note: str | None = None) -> None:
            nonlocal told
            progress.update(task, advance=n, **({"note": note} if note is not None else {}))
            if not console.is_terminal and time.monotonic() - told > LINE_EVERY:
                told = time.monotonic()
                console.print(progress.get_renderable())

        yield advance


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yields the items and counts them on a progress bar.

    Args:
      items: anything to iterate over.
      what: the name of the work.
      total: the number of items; None if unknown.
    """
    with bar(what, total) as advance:
        for item in items:
            yield item
            advance()


def log(text: str) -> None:
    """Prints one line for the user on stderr (stdout is for results)."""
    console.print(text, markup=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Silences TensorFlow, absl, TFDS and libtpu at start-up. To be called before they are imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/*"):  # where Linux shows TPUs
        os.environ |= NO_TPU
    for name in ("absl", "tensorflow", "orbax", "bm25s", "jax", "tensorflow_datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore")
