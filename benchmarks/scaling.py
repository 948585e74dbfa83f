"""How does generative retrieval scale? The study of Pradeep et al. (2023), from random weights.

    python benchmarks/scaling.py ../shared/data/wordnet --work /tmp/scaling --plan
    python benchmarks/scaling.py ../shared/data/wordnet --work /tmp/scaling --plot scaling.png

Corpora of 1k, 4k, 16k, 64k and 117k passages are cut of each collection as the paper cut MSMarco100k and
1M: the passages of all test and dev queries, then of train queries, then others. Test queries are the same
at every size (--queries, chosen by a hash), and nothing is chosen on them: it is atomic docids (else the next
of --methods) whose gap to the dual encoder is told. On each corpus learn, from random weights and on one
small network without encoder layers:

    docids       atomic, naive, semantic, 2-D with PAWA, rq, rq and ranking (`retrieval-jax ripor`), rq and
                 planning ahead (`retrieval-jax pag`)
    mixtures     of the paper: 1a labelled queries; 2a with the passages' first tokens; 3b with synthetic
                 queries, too; 6b synthetic queries alone
    beside them  BM25, BM25 over passages with synthetic queries, a dual encoder (mixture 3b)

Synthetic queries are of a generator that learned on the train queries of the largest corpus. Semantic and
rq docids cluster the vectors of the dual encoder with 3b and seed 0, whose training is not counted as
theirs. Ranking and planning train several models, which share the examples of one (`stages` in
_scaling_plan.py); two weights are chosen on --dev queries: those of the teacher's parts, and of a docid's
score beside its set's. Searches have 40 beams, planned ones 10. Steps grow with the square root of the
corpus (the paper: 1M steps at 100k, 9M at 8.8M). The budget `examples` gives all methods of a corpus as many
examples; the budget `flops` gives generative ones the operations of naive docids with 3b (matrix products of
the training, three times the forward pass). --widths are other sizes of the network, on one corpus (--fixed).

Every figure is of test queries. MRR@10, differences and predictions have 95% intervals, over queries and,
where there are several, seeds. Whether a difference is one is decided by the paired randomisation test (of
several seeds: by the interval); nothing is gained where less than 5% is. Contrastive entropy is the one
metric that both families have: -log of the relevant passage's share of exp(score) among 256 random ones, in
10 draws; a score is the exact log-probability of a docid, or a cosine times the training's scale; ranking and
planning, which add up raw logits, have none. Its law by passages is fitted to all corpora, and to all but the
largest, which is predicted; beside the prediction stands what was seen on the corpus before. Recall@10 of the
largest corpus is predicted from the scores of the one before, that of 8.8M passages from the largest.

Of the paper's questions and its successors' these are left out: the best size for a budget, a joint law in
parameters and passages, and pretrained weights of several sizes.

The plan is printed first, with an estimate of its hours on two cores without other work: 14 for wordnet with
one seed, and --sizes, --methods, --mixtures and --budgets choose a part. What is finished is kept in --work,
and the same command goes on, also with more methods or seeds; after --minutes no other point begins. What
fails is told, and the others go on; the same command tries it again. Prints tables, then one line of JSON.
--quick measures a few methods on 120 and 240 passages.
"""

import argparse
import dataclasses
import json
import math
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

import _quiet  # noqa: F401
from _scaling_plan import (
    METHODS,
    ROWS,
    WIDTH,
    Choice,
    Point,
    Sizes,
    generating_seconds,
    generator_seconds,
    points,
    seconds_of,
)
from _scaling_plot import draw
from _scaling_run import Study
from _scaling_told import findings, fits, rows_of
from _verbs import parse
from rich.console import Console
from rich.table import Table

from retrieval_jax.core.errors import Preempted, UserError
from retrieval_jax.core.progress import log

SIZES = (1000, 4000, 16_000, 64_000, 117_659)
QUICK = {
    "sizes": [120, 240],
    "methods": ["BM25", "BM25 + doc2query", "dual encoder", "atomic"],
    "mixtures": ["2a", "3b"],
    "budgets": ["examples"],
    "widths": [],
    "steps": 30,
    "seeds": 1,
}
FACTS = ("corpus", "method", "mixture", "budget", "width", "seed")
QUICK_SIZES = Sizes(queries=40, dev=10, scored=16, draws=2, negatives=64, generated=2, generator_steps=4)
QUICK_DOCS = ["import_collection.vocab_size=2000", "import_collection.docs_packages=('optax',)"]


def show_plan(study: Study) -> None:
    """Prints what will run, in its order, and how long it takes."""
    choice, sizes = study.choice, study.sizes
    table = Table("passages", "steps", "methods, mixtures and budgets, by seed", "minutes")
    groups: dict[int, list] = {}
    for point in points(choice):
        groups.setdefault(point.size, []).append(point)
    generates = any(point.reads_synthetic for some in groups.values() for point in some)
    total = generator_seconds(sizes.generator_steps) if generates else 0.0
    for size, some in groups.items():
        different = size * -math.expm1(-sizes.draws * sizes.negatives / size)  # passages that are drawn
        pairs = round(sizes.scored * different)
        seconds = sum(seconds_of(point, choice, sizes.queries, pairs) for point in some)
        if any(point.reads_synthetic for point in some):
            seconds += generating_seconds(size, sizes.generated)
        of_method: dict[str, list[str]] = {}
        for point in some:
            facts = [point.mixture or "", *(["flops"] if point.budget == "flops" else [])]
            facts += [f"width {point.width}"] if point.width != WIDTH else []
            if point.seed == 0:
                of_method.setdefault(point.method, []).append(" ".join(facts))
        names = "; ".join(f"{name} {', '.join(rows)}".strip() for name, rows in of_method.items())
        table.add_row(f"{size:,}", f"{choice.steps_of(size):,}", names, f"{seconds / 60:.0f}")
        total += seconds
    console = Console(width=120)
    console.print(table)
    generator = f", with the query generator's {sizes.generator_steps:,} steps" if generates else ""
    console.print(
        f"{study.name}: {len([*points(choice)])} points ({choice.seeds} seed{'s' * (choice.seeds > 1)}), "
        f"about {total / 3600:.1f} hours on two cores without other work{generator}"
    )


def measure(study: Study, deadline: float) -> tuple[dict[Point, dict], dict[Point, str]]:
    """Measures the points of the plan, until the time is up.

    A point that fails, at whatever, is left out, and the others go on; the same command tries it again.

    Returns:
      (point -> figures, point -> what failed).
    """
    found, failed, todo = {}, {}, [*points(study.choice)]
    for number, point in enumerate(todo, 1):
        what = f"{study.name} {number}/{len(todo)}: {point.size:,} passages, {point.name}"
        try:
            if study.file(point).exists() or time.monotonic() < deadline:
                log(what)
                found[point] = study.measure(point)
        except Preempted:
            raise
        except Exception as error:
            if not isinstance(error, UserError):
                traceback.print_exc()
            failed[point] = f"{type(error).__name__}: {error}".splitlines()[0]
            traceback.clear_frames(error.__traceback__)  # which hold arrays
            log(f"{what}: {failed[point]}")
    if missing := len(todo) - len(found):
        log(f"{study.name}: {missing} of {len(todo)} points are not measured; {len(failed)} of them failed")
    return found, failed


def show(name: str, told: Mapping[str, list[dict]]) -> None:
    """Prints the tables."""
    console = Console(width=140, markup=False)
    if failed := told.get("failed"):
        table = Table("passages", "method", "mixture", "budget", "width", "seed", "error", title="Failed")
        for one in failed:
            table.add_row(*(str(one[name]) if one[name] is not None else "" for name in FACTS), one["error"])
        console.print(table)
    table = Table(
        "passages", "method", "mixture", "budget", "width", "parameters", "FLOPs", "MRR@10", "95%", "entropy",
        title=name,
    )  # fmt: skip
    for one in told["points"]:
        facts = [one["mixture"] or "", one["budget"], str(one["width"]), f"{one['parameters']:,}"]
        interval, entropy = one["interval"], one["contrastive_entropy"]
        table.add_row(
            f"{one['corpus']:,}", one["method"], *facts, f"{one['flops']:.1e}", f"{one['mrr_at_10']:.3f}",
            f"{interval[0]:.3f}-{interval[1]:.3f}", "" if entropy is None else f"{entropy:.2f}",
        )  # fmt: skip
    console.print(table)
    columns = ("before", "predicted", "seen", "predicted - seen", "95%")
    table = Table("law", "method", "mixture", "budget", "largest", *columns)
    for law in told["fits"]:
        difference, low, high = law["difference"]
        table.add_row(
            law["law"], law["method"], law["mixture"] or "", law["budget"], f"{law['largest']:,}",
            *(f"{law[name]:.3f}" for name in columns[:3]), f"{difference:+.3f}", f"{low:+.3f} to {high:+.3f}",
        )  # fmt: skip
    console.print(table)
    table = Table("the paper", "seen here: MRR@10 and its 95% interval", "agrees")
    for finding in told["findings"]:
        agrees = {True: "yes", False: "no", None: "undecided"}[finding["agrees"]]
        table.add_row(finding["claim"], finding["seen"], agrees)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("collections", nargs="*", default=["python_docs"])
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="passages of the corpora")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--mixtures", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--budgets", nargs="+", default=["examples", "flops"], choices=("examples", "flops"))
    parser.add_argument("--widths", nargs="*", type=int, default=[64, 128, 512], help="beside 256")
    parser.add_argument("--fixed", type=int, default=16_000, help="other widths: the corpus nearest to this")
    parser.add_argument("--steps", type=int, default=300, help="of a training on a thousand passages")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    for name, default in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=default, help="see Sizes in _scaling_plan.py")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no point begins")
    parser.add_argument("--plot", type=Path, help="of several collections: NAME_PLOT")
    parser.add_argument("--plan", action="store_true", help="import, cut and print the plan alone")
    parser.add_argument("--quick", action="store_true", help="little of everything")
    args, bindings = parse(parser)
    sizes = Sizes(**{name: getattr(args, name) for name in vars(Sizes())})
    if args.quick:
        vars(args).update(QUICK)
        args.collections, sizes, bindings = ["python_docs"], QUICK_SIZES, [*QUICK_DOCS, *bindings]
    names = ("sizes", "methods", "mixtures", "budgets", "widths", "fixed", "seeds", "steps")
    choice = Choice(**{name: getattr(args, name) for name in names})

    deadline = time.monotonic() + 60 * args.minutes
    studies = []
    for given in args.collections:
        try:
            studies.append(Study(given, args.work / Path(given).name, choice, sizes, bindings))
        except UserError as error:
            log(f"{given}: {error}".splitlines()[0])
    if not studies:
        raise SystemExit(2)
    for study in studies:
        show_plan(study)
    if args.plan:
        return
    results = {}
    for study in studies:
        figures, failed = measure(study, deadline)
        rows = rows_of(figures)
        told = {
            "points": [row.told() for row in rows],
            "fits": fits(rows),
            "findings": findings(rows),
        }
        if failed:
            told["failed"] = [
                dict(zip(FACTS, dataclasses.astuple(point), strict=True)) | {"error": error}
                for point, error in failed.items()
            ]
        show(study.name, told)
        if args.plot and rows:
            path = args.plot.with_name(
                f"{study.name}_{args.plot.name}" if len(studies) > 1 else args.plot.name
            )
            draw(study.name, rows, told["fits"], path)
        results[study.name] = told
    print(json.dumps(results if len(results) > 1 else results[study.name]))


if __name__ == "__main__":
    main()
