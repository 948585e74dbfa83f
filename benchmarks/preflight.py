"""Which configurations fit which TPU slices? Compiled by the TPU's compiler, without a TPU.

    python benchmarks/preflight.py [--quick] [--only WORD …] [--out FILE] [--gin.NAME=VALUE …]

A row is one call of `retrieval-jax preflight` in a process of its own, on one slice: the tasks of the
generative-retrieval paper at its batch of 512, inputs of 128 tokens, Adafactor, float32 parameters and
bfloat16 computation, on MS MARCO's 8,841,823 passages; and a dual encoder at a batch of 4,096. Bindings are
added to every row. --only keeps the rows whose name or slice contains one of the words; --quick compiles a
tiny network on two generations.

Prints one line of JSON a row: name, topology, mesh, fits, peak_gib, hbm_gib, flops_per_step,
least_ms_per_step (see `retrieval-jax preflight --help`), compile_seconds; {name, topology, failed: why} for
what stopped. Needs libtpu: the extra "tpu".
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

from _verbs import parse, run

from retrieval_jax.core.progress import log

TOLD = ("mesh", "fits", "peak_gib", "hbm_gib", "flops_per_step", "least_ms_per_step", "compile_seconds")
RECIPE = (
    "train.optimizer=@adafactor",
    "adafactor.schedule=@learning_rate()",
    "learning_rate.peak=1e-3",
    "learning_rate.steps=1",
    "T5Config.dtype='bfloat16'",
    "T5Config.dropout_rate=0.1",
    "train.random_bits='rbg'",
    "DataConfig.input_length=128",
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
    "DataConfig.input_length=64",
    "DataConfig.passage_length=128",
)
PAWA = (*GENERATIVE, "DOCIDS='semantic_2d'")
SMALL, MIDDLE, LARGE = (
    ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"),
    ("v4:2x2x4", "v5e:4x4", "v5p:2x2x4", "v6e:4x4"),
    ("v4:4x4x4", "v5e:8x8", "v5p:4x4x4", "v6e:8x8"),
)
FSDP, WIDE = "sharding/fsdp.gin", "sharding/wide_softmax.gin"
SCANNED = ("T5Config.scan_layers=True", "T5Config.remat='full'")
# Name, gin files, bindings, model parallelism, slices.
ROWS = (
    ("XL naive", ("models/xl.gin", FSDP), NAIVE, 1, MIDDLE),
    ("XXL naive", ("models/xxl.gin", FSDP), NAIVE, 1, MIDDLE),
    ("XXL naive, 4 chips share the weights", ("models/xxl.gin", FSDP), NAIVE, 4, LARGE),
    ("base atomic", ("models/base.gin", WIDE), (*ATOMIC, *SCANNED), 1, (*SMALL, *MIDDLE)),
    ("large PAWA", ("models/large_pawa.gin", FSDP), (*PAWA, *SCANNED), 1, MIDDLE),
    ("base dual encoder", ("models/base.gin", FSDP), (*DUAL, *SCANNED), 1, MIDDLE),
    ("large dual encoder", ("models/large.gin", FSDP), (*DUAL, *SCANNED), 1, LARGE),
)
QUICK = (("tiny naive", ("models/tiny.gin",), NAIVE, 1, SMALL[:2]),)


def row(files: tuple[str, ...], bindings: tuple[str, ...], parallelism: int, topology: str) -> dict:
    """What the verb tells of one slice."""
    settings = (*bindings, f"make_mesh.model_parallelism={parallelism}", f"TOPOLOGY={topology!r}")
    arguments = [f"--gin_file={file}" for file in files] + [f"--gin.{setting}" for setting in settings]
    try:
        told = run("preflight", *arguments)
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
    args, added = parse(parser)
    chosen = [
        (name, files, bindings, parallelism, topology)
        for name, files, bindings, parallelism, topologies in (QUICK if args.quick else ROWS)
        for topology in topologies
        if any(word in f"{name} {topology}" for word in args.only)
    ]
    for number, (name, files, bindings, parallelism, topology) in enumerate(chosen, 1):
        log(f"{number} of {len(chosen)}: {name} on {topology} …")
        began = time.monotonic()
        made = {"name": name, "topology": topology}
        made |= row(files, (*bindings, *added), parallelism, topology)
        line = json.dumps(made)
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as out:
                out.write(line + "\n")
        log(f"{number} of {len(chosen)}: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
