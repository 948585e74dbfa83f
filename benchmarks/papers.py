"""Does each published row fit the pod that its paper used, and how long would it take at least?

    python benchmarks/papers.py [--only WORD …] [--out FILE] [--gin.NAME=VALUE …]

Asks `retrieval-jax preflight` about the rows of gin_configs/papers/, one call for all that give the same
program on the same slice (they differ in their examples, names or number of steps), the widest networks last.
--only keeps the programs with a row whose path contains one of the words. --out keeps each program's line in
a file, too; a program whose line is there is not compiled again, unless its settings, its rows or the
bindings are others. Bindings are added to every row.

Prints a table: a program's rows, slice, memory a chip, FLOPs a step, least milliseconds a step, and days of
all its rows' steps, if chips told each other everything in no time and reached their peak. The last line is
JSON: a list of {rows, program, topology, mesh, fits, peak_gib, hbm_gib, flops_per_step, least_ms_per_step,
least_days, compile_seconds}, least_days a number for each number of steps. Needs libtpu: the extra "tpu".
"""

import argparse
import json
import subprocess
from pathlib import Path

import gin
from _verbs import parse, run
from preflight import TOLD

from retrieval_jax.core import configuration, storage
from retrieval_jax.core.progress import log
from retrieval_jax.main import configure_verbs
from retrieval_jax.verbs.preflight import configured

FOLDER = configuration.gin_folder() / "papers"
# Whose parameters shape a training step, beside the slice and its arrays.
SHAPING = ("T5Config", "GenerativeRetriever", "DualEncoder", "LexicalEncoder", "make_mesh", "axis_rules")


def programs(words: list[str]) -> dict[str, list[tuple[str, int]]]:
    """What makes a program -> its rows and their steps, smallest network first."""
    configure_verbs([], [])
    found: dict[str, list[tuple[str, int]]] = {}
    sizes = {}
    for file in sorted(FOLDER.rglob("*.gin")):
        row = str(file.relative_to(FOLDER))
        configuration.configure([f"papers/{row}"], [])
        if file.stem.startswith("bm25"):  # nothing is trained
            continue
        plan = configured(False, gin.get_bindings("preflight").get("passages"), None)
        # By their names, as functions' addresses differ from one process to the next.
        shaping = (gin.get_bindings(name, resolve_references=False) for name in SHAPING)
        settings = [str(sorted(bound.items())) for bound in shaping]
        train = gin.get_bindings("train")
        settings += [str(train.get(name)) for name in ("microbatches", "random_bits")]
        docids = plan.facts.get("docids")
        key = str([gin.query_parameter("%TOPOLOGY"), plan.shapes, docids, *settings])
        found.setdefault(key, []).append((row, plan.steps))
        sizes[key] = plan.model.config.emb_dim
    chosen = {
        key: rows
        for key, rows in sorted(found.items(), key=lambda item: sizes[item[0]])
        if any(word in row for word in words for row, _ in rows)
    }
    return chosen


def ask(row: str, bindings: list[str]) -> dict:
    """What preflight tells of a row."""
    return run(
        "preflight",
        f"--gin_file=papers/{row}",
        "--gin.preflight.smallest=False",
        *(f"--gin.{binding}" for binding in bindings),
    )


def table(programs: list[dict]) -> str:
    """In Markdown; a program's further rows are counted."""
    lines = ["| row | slice (mesh) | fits | peak GiB a chip | FLOPs a step | least ms a step | least days |"]
    lines.append("|---|---|---|---|---|---|---|")
    for p in programs:
        first, *others = (row.removesuffix(".gin") for row in p["rows"])
        name = f"{first}, and {len(others)} more" if others else first
        if "failed" in p:
            lines.append(f"| {name} | {p['failed']} |")
            continue
        days = ", ".join(f"{days:.2g} ({int(steps):,} steps)" for steps, days in p["least_days"].items())
        lines.append(
            f"| {name} | {p['topology']} ({p['mesh']}) | {'yes' if p['fits'] else 'no'} | "
            f"{p['peak_gib']:.2f} of {p['hbm_gib']:.2f} | {p['flops_per_step']:.2e} | "
            f"{p['least_ms_per_step']:.1f} | {days} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", default=[""], help="words in the rows' paths")
    parser.add_argument("--out", type=Path, help="a file that keeps what was told, line by line")
    args, bindings = parse(parser)
    kept = {}
    if args.out and args.out.exists():
        kept = {line.get("program"): line for line in map(json.loads, args.out.read_text().splitlines())}
    found, told = programs(args.only), []
    for number, (key, rows) in enumerate(found.items(), 1):
        first = rows[0][0]
        program = storage.digest([key, *bindings, *(f"{row} {steps}" for row, steps in rows)])
        if program in kept:
            told.append(kept[program])
            continue
        log(f"{number} of {len(found)}: {first} …")
        made = {"rows": [row for row, _ in rows], "program": program}
        try:
            answer = ask(first, bindings)
        except subprocess.CalledProcessError as error:
            made |= {"failed": f"exit status {error.returncode}, after what is on stderr"}
        else:
            made |= {key: answer[key] for key in ("topology", *TOLD)}
            ms = answer["least_ms_per_step"]
            made["least_days"] = {str(steps): ms * steps / 86_400e3 for steps in sorted({s for _, s in rows})}
            if args.out:
                with args.out.open("a") as out:
                    out.write(json.dumps(made) + "\n")
        told.append(made)
    print(table(told))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
