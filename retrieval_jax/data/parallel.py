"""Work in pieces: a function of many jobs, on all cores of this machine or on Apache Beam.

Beam's own local runner is not used: where the system kills one of its workers (for memory, say) it waits for
that worker for ever. A pool of processes says so and ends.
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


def map_jobs(function: Callable[[Job], Result], jobs: Sequence[Job], what: str) -> list[Result]:
    """The results of `function` for the jobs, in their order; `what` names the work on the progress bar.

    Several jobs run in as many processes as there are cores, so functions, jobs and results are picklable;
    one job runs right here. Raises what a job raised, and UserError where a process was killed.
    """
    if len(jobs) <= 1:
        return [function(job) for job in jobs]
    pool = concurrent.futures.ProcessPoolExecutor(
        min(len(jobs), os.cpu_count() or 1),
        multiprocessing.get_context("spawn"),  # a fork of a process with threads may hang
        initializer=_end_with_parent,
        initargs=(os.getpid(),),
    )
    with pool, bar(what, len(jobs)) as advance:
        futures = [pool.submit(function, job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                advance()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(f"{what}: a worker process was killed: is there enough memory?") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def _end_with_parent(parent: int) -> None:
    """Ends this worker soon after its parent is gone, however that was killed; Ctrl-C is for the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def check_beam_options(options: Sequence[str], folder: Path) -> None:
    """Raises UserError where a Beam runner's workers elsewhere would make files for a folder in a bucket."""
    runners = [option.partition("=")[2] for option in options if option.startswith("--runner=")]
    if paths.is_remote(folder) and not set(runners) <= {"DirectRunner"}:
        raise UserError(
            f"{folder}: {runners[-1]}'s workers write to a file system that they share, not to a bucket: "
            "mount it (gcsfuse) and name the mounted folder, or leave beam_options out"
        )


def run_on_beam(function: Callable[[Job], object], jobs: Sequence[Job], options: Sequence[str]) -> None:
    """Runs `function` for the jobs on a Beam runner, for what it does, not for what it gives.

    `options` are Beam's flags, as in ("--runner=FlinkRunner", …); the workers share this file system.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        # The Reshuffle hands each job to a worker of its own; without it, one would do them all.
        _ = pipeline | beam.Create(jobs, reshuffle=False) | beam.Reshuffle() | beam.Map(function)
