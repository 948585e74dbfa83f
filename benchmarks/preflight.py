"""Which configurations fit which TPU slices? Compiled by the TPU's compiler, without a TPU.

    python benchmarks/preflight.py [--quick] [--only WORD …] [--out FILE] [--gin.NAME=VALUE …]

A row is one call of `retrieval-jax preflight` in a process of its own, on one slice: the tasks of the
generative-retrieval paper at its batch of 512, inputs of 128 tokens, Adafactor, float32 parameters and
bfloat16 computation, on MS MARCO's 8,841,823 passages; and a dual encoder at a batch of 4,096. Bindings are
added to every row. --only keeps the rows whose name or slice contains one of the words; --quick compiles a
tiny network on two generations.

Prints one line of JSON a row: name, topology, mesh, fits, peak_gib, hbm_gib, flops_per_step,
least_ms_per_step (see `retrieval-jax preflight --help`), compile_seconds; {name, topology, skipped: why}
for what was not run, {name, topology, failed: why} for what stopped. Needs libtpu: the extra "tpu".
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

from _verbs import run

from retrieval_jax.configuration import gin_folder
from retrieval_jax.progress import say

TOLD = ("mesh", "fits", "peak_gib", "hbm_gib", "flops_per_step", "least_ms_per_step", "compile_seconds")
RECIPE = (
    "train.optimizer=@adafactor",
    "adafactor.schedule=@learning_rate()",
    "learning_rate.peak=1e-3",
    "learning_rate.steps=1",
    "T5Config.dtype='bfloat16'",
    "T5Config.dropout_rate=0.1",
    "make_train_step.random_bits='rbg'",
    "TrainingData.input_length=128",
    "preflight.smallest=False",
    "preflight.passages=8841823",  # whatever lies in the working folder
)
GENERATIVE = (*RECIPE, "train.retriever=@GenerativeRetriever", "train.docids=%DOCIDS", "train.batch_size=512")
NAIVE = (*GENERATIVE, "DOCIDS='naive'")
# 8,847,360 outputs, which divide over 16 chips and by 128.
ATOMIC = (*GENERATIVE, "DOCIDS='atomic'", "preflight.passages=8847359")
DUAL = (
    *RECIPE,
    "train.retriever=@DualEncoder",
    "train.batch_size=4096",
    "TrainingData.input_length=64",
    "TrainingData.passage_length=128",
)
PAWA = (*GENERATIVE, "DOCIDS='semantic_2d'")
SMALL, MIDDLE, LARGE = (
    ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"),
    ("v4:2x2x4", "v5e:4x4", "v5p:2x2x4", "v6e:4x4"),
    ("v4:4x4x4", "v5e:8x8", "v5p:4x4x4", "v6e:8x8"),
)
# Name, gin file, bindings, model parallelism, slices. Where the file does not exist the row is skipped.
ROWS = (
    ("XL naive", "models/xl.gin", NAIVE, 1, MIDDLE),
    ("XXL naive", "models/xxl.gin", NAIVE, 1, MIDDLE),
    ("XXL naive, 4 chips share the weights", "models/xxl.gin", NAIVE, 4, LARGE),
    ("base atomic", "models/base.gin", ATOMIC, 4, SMALL),
    ("base atomic", "models/base.gin", ATOMIC, 16, MIDDLE),
    ("large PAWA", "models/large_pawa.gin", PAWA, 1, MIDDLE),
    ("base dual encoder", "models/base.gin", DUAL, 1, MIDDLE),
    ("large dual encoder", "models/large.gin", DUAL, 1, LARGE),
)
QUICK = (("tiny naive", "models/tiny.gin", NAIVE, 1, SMALL[:2]),)


def row(file: str, bindings: tuple[str, ...], parallelism: int, topology: str) -> dict:
    """What the verb tells of one slice."""
    if not (gin_folder() / file).is_file():
        return {"skipped": f"no gin_configs/{file} yet"}
    settings = (*bindings, f"make_mesh.model_parallelism={parallelism}", f"TOPOLOGY={topology!r}")
    try:
        told = run("preflight", f"--gin_file={file}", *(f"--gin.{setting}" for setting in settings))
    except subprocess.CalledProcessError as error:
        return {"failed": f"exit status {error.returncode}, after what is on stderr"}
    return {key: told[key] for key in TOLD}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="a tiny network alone")
    parser.add_argument("--only", nargs="+", default=[""], help="words in the names or slices of rows")
    parser.add_argument("--out", type=Path, help="a file to which the rows are added, too")
    args, others = parser.parse_known_args()
    wrong = [argument for argument in others if not argument.startswith("--gin.")]
    if wrong:
        parser.error(f"{wrong[0]}: not an option")
    added = tuple(argument.removeprefix("--gin.") for argument in others)
    chosen = [
        (name, file, bindings, parallelism, topology)
        for name, file, bindings, parallelism, topologies in (QUICK if args.quick else ROWS)
        for topology in topologies
        if any(word in f"{name} {topology}" for word in args.only)
    ]
    for number, (name, file, bindings, parallelism, topology) in enumerate(chosen, 1):
        say(f"{number} of {len(chosen)}: {name} on {topology} …")
        began = time.monotonic()
        made = {"name": name, "topology": topology}
        made |= row(file, (*bindings, *added), parallelism, topology)
        line = json.dumps(made)
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as out:
                out.write(line + "\n")
        say(f"{number} of {len(chosen)}: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
