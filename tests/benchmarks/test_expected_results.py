"""What the run files promise: their comments, RESULTS.md, the README's table and the steps agree."""

import re
import shlex
from pathlib import Path

import gin
import pytest

from retrieval_jax.core import configuration
from retrieval_jax.main import parse
from retrieval_jax.verbs.table import DEFAULT_FILES, VERBS, configure_verbs
from retrieval_jax.verbs.train import TrainConfig, steps_for

ROOT = Path(__file__).parents[2]
RUNS = {path.name: path.read_text() for path in (configuration.gin_folder() / "runs").glob("*.gin")}
PYTHON_DOCS = 5000  # passages
ROWS = {
    name: cells.split(" | ")
    for name, cells in re.findall(
        r"^\| `runs/([\w.]+)` \| (.*) \|$", (ROOT / "benchmarks/RESULTS.md").read_text(), re.MULTILINE
    )
}


def mrr(result: str) -> dict[str, float]:
    """Method -> MRR@10, of a result such as "MRR@10: exact 0.425, bm25 0.602"."""
    assert re.fullmatch(r"MRR@10: \w+ 0\.\d{3}(, \w+ 0\.\d{3})*", result), result
    return {method: float(value) for method, value in re.findall(r"(\w+) (0\.\d{3})", result)}


@pytest.mark.parametrize("file", sorted(RUNS))
def test_every_run_file_says_what_to_expect(file: str):
    said = dict(re.findall(r"^# (Expect|Takes|Command): (.*)$", RUNS[file], re.MULTILINE))
    if said.get("Expect", "").startswith("not measured: "):
        assert file not in ROWS
        return
    result, queries, takes, machine, command = ROWS[file]
    assert said == {
        "Expect": f"{result} ({queries})",
        "Takes": f"{takes} on {machine}",
        "Command": command,
    }
    assert mrr(result)
    assert "minutes" in takes
    program, *argv = shlex.split(command.strip("`"))
    verb, files, bindings, _ = parse(argv)
    assert program == "retrieval-jax"
    assert verb in VERBS
    configure_verbs(files or DEFAULT_FILES[verb], bindings)
    if steps := re.match(r"(\d+) steps", takes):
        if not files:
            configure_verbs([f"runs/{file}", *DEFAULT_FILES[verb]], bindings)
        with gin.config_scope(None if files else file.removesuffix(".gin")):
            config = TrainConfig() if not files else None
        given = gin.query_parameter("%STEPS")
        assert int(steps[1]) == (given or steps_for(PYTHON_DOCS, config.steps_factor))


@pytest.mark.parametrize(("scope", "steps"), [("dense", 400), ("rank", 100)])
def test_steps_of_ripor_on_squads_2067_passages_are_those_that_its_file_tells(scope: str, steps: int):
    configure_verbs(["runs/ripor.gin", *DEFAULT_FILES["train"]], [])
    with gin.config_scope(scope):
        assert steps_for(2067, TrainConfig().steps_factor) == steps


def test_the_rows_are_the_readmes_table():
    table = re.search(r"```\n(\s+MRR .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1].splitlines()
    end = table[1].index("@10") + len("@10")  # values end where the heading of MRR does
    shown = {line.split()[0]: float(line[:end][-5:]) for line in table[2:]}
    demo = mrr(ROWS["demo.gin"][0])
    assert demo == {method: value for method, value in shown.items() if method in demo}
    for file in ("atomic.gin", "dual_encoder.gin"):
        assert mrr(ROWS[file][0]).items() <= demo.items()
