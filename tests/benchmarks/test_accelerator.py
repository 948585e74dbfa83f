"""The accelerator's benchmark, as a process, with sizes for a processor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "accelerator.py"
POSITIVE = {
    "train": ("steps_per_second", "examples_per_second"),
    "beam": ("ms_per_query", "constraint_cost", "constraint_share", "trie_gib"),
    "atomic": ("ms_per_query", "constraint_cost", "constraint_share"),
    "encoding": ("passages_per_second",),
    "exact": ("queries_per_second",),
    "gradient": ("seconds_per_step", "pairs_per_second"),
}


def run(script: Path, *arguments: str) -> tuple[list[str], dict]:
    """Runs a script; gives (the lines before the last, the JSON of the last)."""
    command = [sys.executable, str(script), "--tiny", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    return lines, json.loads(last)


def check(lines: list[str], part: str, figures: dict) -> None:
    (line,) = (line for line in lines if line.startswith(f"{part}: "))
    for name in (*POSITIVE[part.partition("_")[0]], "compile_seconds", "seconds"):
        assert figures[name] > 0, (part, name)
        assert f"{name} " in line
    assert figures.get("mfu") is None  # of a processor


@pytest.mark.slow
def test_every_part_runs_and_gives_numbers():
    lines, told = run(SCRIPT, "--minutes", "30")
    assert told["skipped"] == {}
    kinds = ("naive", "naive_digits", "semantic", "semantic_2d", "rq_8x256", "rq_8x2048")
    parts = ("train_base", "train_large", "atomic", "encoding", "exact", "gradient_cache")
    assert {*told["parts"]} == {*parts, *(f"beam_{kind}" for kind in kinds)}
    for part, figures in told["parts"].items():
        check(lines, part, figures)
    assert told["parts"]["exact"]["found_itself"] == 1
    assert told["device"]["peak_flops"] is None


BROKEN = """
import dataclasses, os, sys, time

sys.path.insert(0, {folder!r})
import accelerator

accelerator.PARTS["beam_naive"] = dataclasses.replace(accelerator.PARTS["beam_naive"], most=15)
accelerator.PARTS["gradient_cache"] = dataclasses.replace(accelerator.PARTS["gradient_cache"], least=10**6)
if "--measure" in sys.argv:
    import jax
    import _accelerator

    def fail(sizes, name):
        raise RuntimeError("made to fail\\nat length")

    def beam(sizes, kind):
        if kind == "naive":
            time.sleep(1000)
        if kind == "rq_8x256":
            os.abort()
        return {{"ms_per_query": 1.0}}

    def needs(rows):
        if rows > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return {{"rows": rows}}

    _accelerator.train, _accelerator.beam = fail, beam
    _accelerator.atomic = lambda sizes: _accelerator.where_it_fits(needs, 16)
accelerator.main()
"""


def test_what_fails_dies_or_hangs_is_skipped_with_a_line_and_the_rest_runs(tmp_path: Path):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(folder=str(SCRIPT.parent)))
    parts = ("train_base", "beam_naive", "beam_rq_8x256", "beam_semantic_2d", "atomic", "exact")
    lines, told = run(script, "--only", *parts, "gradient_cache")
    skipped = told["skipped"]
    assert skipped["train_base"] == "RuntimeError: made to fail"
    assert skipped["beam_naive"].startswith("stopped after ")
    assert skipped["beam_rq_8x256"] == "its process ended with status -6"
    assert "it takes at least 1000000 s" in skipped["gradient_cache"]
    for part, why in skipped.items():
        assert f"{part}: skipped: {why}" in lines
    assert {*told["parts"]} == {"beam_semantic_2d", "atomic", "exact"}
    assert told["parts"]["atomic"]["rows"] == 2
    check(lines, "exact", told["parts"]["exact"])


def test_at_the_time_limit_the_json_has_what_there_is():
    lines, told = run(SCRIPT, "--minutes", "0")
    assert told["parts"] == {}
    assert len(told["skipped"]) == len(lines) == 12
    assert told["device"] is None
