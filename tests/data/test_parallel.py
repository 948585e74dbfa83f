"""Jobs on several processes: results in order, and no failure that goes unnoticed."""

import os
from pathlib import Path

import pytest

from retrieval_jax.core import paths
from retrieval_jax.core.errors import UserError
from retrieval_jax.data import parallel


def test_results_are_in_the_order_of_the_jobs():
    assert parallel.map_jobs(abs, [-3, 2, -1, 0], "taking absolutes") == [3, 2, 1, 0]
    assert parallel.map_jobs(abs, [], "nothing") == []


def test_one_job_runs_here():
    assert parallel.map_jobs(lambda job: (job, os.getpid()), ["a"], "one") == [("a", os.getpid())]


def test_what_a_job_raises_is_raised():
    with pytest.raises(ValueError, match=r"invalid literal for int.*'x'"):
        parallel.map_jobs(int, ["1", "x"], "reading numbers")


def test_a_killed_worker_is_told():
    with pytest.raises(UserError, match="dying: a worker process was killed"):
        parallel.map_jobs(os._exit, [9, 9], "dying")


def test_a_beam_runner_elsewhere_cannot_write_for_a_bucket(tmp_path: Path):
    bucket = paths.as_path("gs://bucket/work")
    with pytest.raises(UserError, match="DataflowRunner's workers write to a file system that they share"):
        parallel.check_beam_options(("--project=p", "--runner=DataflowRunner"), bucket)
    parallel.check_beam_options(("--runner=DirectRunner", "--direct_num_workers=2"), bucket)
    parallel.check_beam_options(("--runner=FlinkRunner",), tmp_path)
