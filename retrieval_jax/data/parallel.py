"""Functions of many jobs, run on all cores of this machine or on Apache Beam.

Beam's own local runner is not used: if the system kills one of its workers (out of memory, for example), it
waits for that worker for ever. A pool of processes reports it and ends.
"""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import bar

Job = TypeVar("Job")
Result = TypeVar("Result")


def map_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    what: str,
    sizes: Sequence[int] | None = None,
    done: int = 0,
) -> list[Result]:
    """Calls a function for each job, in as many processes as there are cores.

    Args:
      function: the function. It, its arguments and its results must be picklable if there are several jobs.
      jobs: its arguments. A single job runs in this process.
      what: the name of the work on the progress bar.
      sizes: what each job counts on the progress bar; None: 1.
      done: what was done earlier, on the progress bar.

    Returns:
      The results, in the order of the jobs.

    Raises:
      Exception: whatever a job raised.
      UserError: a worker process was killed.
    """
    if len(jobs) <= 1:
        return [function(job) for job in jobs]
    pool = concurrent.futures.ProcessPoolExecutor(
        min(len(jobs), os.cpu_count() or 1),
        multiprocessing.get_context("spawn"),  # a fork of a process with threads may hang
        initializer=_end_with_parent,
        initargs=(os.getpid(),),
    )
    sizes = sizes or [1] * len(jobs)
    with pool, bar(what, done + sum(sizes), done) as advance:
        futures = {pool.submit(function, job): size for job, size in zip(jobs, sizes, strict=True)}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                advance(futures[future])
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(f"{what}: a worker process was killed: is there enough memory?") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def _end_with_parent(parent: int) -> None:
    """Ends this worker soon after its parent has ended, however it was killed. The parent handles Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def check_beam_options(options: Sequence[str], folder: Path) -> None:
    """Raises UserError if a Beam runner's workers on other machines would have to write into a bucket.

    Args:
      options: Beam's flags, as in ("--runner=FlinkRunner", …).
      folder: the folder that they write to.
    """
    runners = [option.partition("=")[2] for option in options if option.startswith("--runner=")]
    if paths.is_remote(folder) and not set(runners) <= {"DirectRunner"}:
        raise UserError(
            f"{folder}: {runners[-1]}'s workers write to a file system that they share, not to a bucket: "
            "mount it (gcsfuse) and name the mounted folder, or leave beam_options out"
        )


def run_on_beam(function: Callable[[Job], object], jobs: Sequence[Job], options: Sequence[str]) -> None:
    """Calls a function for each job on a Beam runner. Its results are ignored.

    Args:
      function: the function, which must be picklable.
      jobs: its arguments.
      options: Beam's flags, as in ("--runner=FlinkRunner", …). The workers must share this file system.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        # The Reshuffle hands each job to a worker of its own; without it, one would do them all.
        _ = pipeline | beam.Create(jobs, reshuffle=False) | beam.Reshuffle() | beam.Map(function)
