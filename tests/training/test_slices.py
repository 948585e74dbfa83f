"""The smallest slice is looked for past those on which the compiler dies."""

import math
import signal

from retrieval_jax.training.slices import smallest_slice
from retrieval_jax.training.worker_process import WorkerProcess


def test_the_smallest_slice_is_found_beyond_one_on_which_the_compiler_dies():
    """v5e:2x2 fits too, but kills the process."""
    with WorkerProcess(math.sqrt, 4) as process:

        def measure_slice(name: str) -> dict:
            if name == "v5e:2x2":
                return process(signal.raise_signal, signal.SIGSEGV)
            return process(dict, {"mesh": name, "fits": name == "v5e:2x4", "peak_gib": 1.0})

        asked = {"mesh": "…", "fits": True, "peak_gib": 0.5, "flops_per_step": 7}
        found = smallest_slice(measure_slice, "v5e:4x4", asked)
        assert found["smallest"] == "v5e:2x4"
        assert [*found["slices"]] == ["v5e:1x1", "v5e:2x2", "v5e:2x4"]
        assert found["slices"]["v5e:2x2"] == {
            "fits": False,
            "why": "the compiler itself broke down (signal SIGSEGV)",
        }
        found = smallest_slice(measure_slice, "v5e:8x16", asked | {"fits": False})
        assert found["smallest"] is None
        assert [*found["slices"]] == ["v5e:8x16", "v5e:16x16"]
