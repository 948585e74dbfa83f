"""The profiler traces the steps that were asked for, and no others."""

from pathlib import Path

import jax
import jax.numpy as jnp

from retrieval_jax.training.profiler import Profiler


def test_the_steps_that_were_asked_for_are_traced(tmp_path: Path):
    profiler, step, traced = Profiler(tmp_path, (2, 3)), jax.jit(lambda x: x + 1), []
    for number in range(8):
        profiler.before(number)
        traced.append(profiler.is_tracing)
        profiler.after(number + 1, {"loss": step(jnp.float32(number))})
    profiler.close()
    assert traced == [False, False, True, True, True, False, False, False]
    assert len([*tmp_path.glob("plugins/profile/*/*.xplane.pb")]) == 1


def test_a_trace_that_a_run_does_not_reach_the_end_of_is_written_when_it_closes(tmp_path: Path):
    profiler = Profiler(tmp_path, (0, 100))
    profiler.before(0)
    jax.block_until_ready(jax.jit(lambda x: x * 2)(jnp.ones(3)))
    profiler.close()
    assert not profiler.is_tracing
    assert [*tmp_path.glob("plugins/profile/*/*.xplane.pb")]
    none = Profiler(tmp_path / "none", None)
    none.before(0)
    none.close()
    assert not (tmp_path / "none").exists()
