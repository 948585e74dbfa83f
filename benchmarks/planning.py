"""What does planning ahead give a generative retriever? MRR@10 and nDCG@10 by beam, from random weights.

    python benchmarks/planning.py ../shared/data/squad_dev ../shared/data/wordnet:20000 --work /tmp/planning
    python benchmarks/planning.py --cost

For each collection (a folder, or a folder and how many of its passages) `retrieval-jax pag` trains one
network from random weights (gin_configs/runs/pag.gin), each training with as many steps as take about
--minutes on a processor's two cores. Test queries are then answered by

    planned       the beam search with a plan, by 1, 5, 10, 40 and 100 beams; the weight of the sequential
                  score is chosen on dev queries, with 10 beams
    unplanned     the beam search of the same network without a plan, by the same beams
    lexical head  the sets of tokens alone, by the same network's weights
    BM25, dual encoder, fused (the teacher: both, with weights chosen on dev queries)

and, all but the searches by 1, 5 and 40 beams, again with one word of each query misspelt. Differences are to
BM25, and to the unplanned search with 100 beams, with p of the paired randomisation test after Holm's
correction over the methods, for each collection and baseline apart; several --seeds are averaged for each
query. Settings were chosen on dev queries. What is finished is kept in --work.

Then the time is measured that planning takes with --sizes simulated passages (see _planning_cost.py); with
--cost nothing else, on whatever device there is.

Prints tables, then one line of JSON: mrr_at_10, ndcg_at_10, and both with misspelt queries, {collection:
{method: {beams: value}}}, where methods without beams have "all"; cost_over_unplanned, {passages: {beams:
ratio}}, and milliseconds.
"""

import argparse
import json

import _planning_cost
import _quiet  # noqa: F401
import numpy as np
from _measure import values_of_queries
from _study import QUICK, Study, add_options, studies
from _verbs import parse
from rich.console import Console
from rich.table import Table

from retrieval_jax.evaluation import significance

BEAMS = (10, 1, 5, 40, 100)  # the weight of the sequential score is chosen with the first
FILES = ("runs/pag.gin",)
SPLITS = ("test", "test~typo")
METRICS = {"mrr_at_10": "MRR@10", "ndcg_at_10": "nDCG@10"}
KINDS = {"planned": "planned", "unplanned": "generative"}
OTHERS = {
    "lexical head": "pag_1_lexical",
    "BM25": "bm25",
    "dual encoder": "pag_dense",
    "fused": "pag_teacher",
}
SEARCHERS = {
    **{(method, str(beams)): f"{method}_{beams}" for method in KINDS for beams in BEAMS},
    **{(method, "all"): name for method, name in OTHERS.items()},
}
"""(method, beams) -> the name of its searcher."""
BASELINES = {"over_bm25": ("BM25", "all"), "over_100_beams_unplanned": ("unplanned", "100")}
TYPO_BEAMS = ("10", "100", "all")  # of the searches for misspelt queries
Values = dict[tuple[str, str], np.ndarray]


def searchers(split: str) -> dict[tuple[str, str], str]:
    """Gives the searchers that answer a split."""
    return {key: name for key, name in SEARCHERS.items() if split == "test" or key[1] in TYPO_BEAMS}


class PlanningStudy(Study):
    """All methods on one collection, with one seed."""

    def make(self) -> None:
        """Makes all runs."""
        steps = {"lexical": 0, "query": self.steps("query"), "dense": self.steps("dense"), "seq2seq": 0}
        steps["rank"] = self.steps("joint")
        self.run("pag", f"pag.steps={steps}", files=FILES)
        self.run("vary", "SPLIT='test'", "vary.kinds=('typo',)")
        weight = None
        for beams in BEAMS:
            weight = self.index("planned", beams, "SETS='pag'", f"make_index.sequential_weight={weight}")
            self.index("unplanned", beams)
        for split in SPLITS:
            for searcher in searchers(split).values():
                self.run("search", f"SEARCHER={searcher!r}", f"SPLIT={split!r}")

    def index(self, method: str, beams: int, *settings: str) -> float | None:
        """Makes a searcher of the network; gives the weight of the sequential score, if it has one."""
        given = [f"MODEL_DIR={str(self.work.model('pag_1'))!r}", f"make_index.name='{method}_{beams}'"]
        given += [f"make_index.kind={KINDS[method]!r}", f"make_index.beams={beams}", *settings]
        return self.run("index", *given, files=FILES).get("sequential_weight")

    def measure(self, metric: str, split: str) -> Values:
        """Gives the metric of each query, by method and beams."""
        values = values_of_queries(self.work, searchers(split).values(), metric, split)
        return {method: values[searcher] for method, searcher in searchers(split).items()}


def nested(values: Values) -> dict[str, dict[str, float]]:
    """Gives {method: {beams: mean}}."""
    told: dict[str, dict[str, float]] = {}
    for (method, beams), some in values.items():
        told.setdefault(method, {})[beams] = float(some.mean())
    return told


def figures(some: list[PlanningStudy]) -> dict:
    """Gives the means of a collection, and the differences in nDCG@10 to each baseline."""
    told = {}
    for split in SPLITS:
        for name, metric in METRICS.items():
            measured = [study.measure(metric, split) for study in some]
            values = {method: np.mean([one[method] for one in measured], axis=0) for method in measured[0]}
            told[name if split == "test" else f"{name}_typo"] = nested(values)
        if split != "test":
            continue
        for name, baseline in BASELINES.items():
            others = {method: x for method, x in values.items() if method != baseline}
            compared = significance.compare(values[baseline], others)
            told[name] = {", ".join(method): [one.mean, one.p_holm] for method, one in compared.items()}
    return told


def show(collection: str, told: dict) -> None:
    """Prints a collection's table."""
    heads = ("MRR@10", "nDCG@10", "over BM25", "p", "over 100 unplanned", "p", "typo nDCG@10", "lost")
    table = Table("method", "beams", *heads, title=collection)
    for method, by_beams in told["ndcg_at_10"].items():
        for beams, value in by_beams.items():
            row = [method, beams, f"{told['mrr_at_10'][method][beams]:.3f}", f"{value:.3f}"]
            for name in BASELINES:
                difference, p = told[name].get(f"{method}, {beams}", (None, None))
                row += ["", ""] if p is None else [f"{difference:+.3f}", f"{p:.1e}"]
            misspelt = told["ndcg_at_10_typo"][method].get(beams)
            row += ["", ""] if misspelt is None else [f"{misspelt:.3f}", f"{value - misspelt:.3f}"]
            table.add_row(*row)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, minutes=1, needs_work=False)
    parser.add_argument("--cost", action="store_true", help="measure the time of planning alone")
    sizes = (_planning_cost.MILLION, _planning_cost.MS_MARCO)
    parser.add_argument("--sizes", nargs="*", type=int, default=sizes, metavar="N", help="simulated passages")
    args, bindings = parse(parser)
    if args.quick:
        args.collections, args.minutes, args.sizes = ["python_docs"], 0.05, [_planning_cost.QUICK]
        bindings = [*QUICK, *bindings]
    if args.cost:
        print(json.dumps(_planning_cost.run(Console(width=160), args.sizes, args.quick)))
        return
    if not args.work:
        parser.error("--work: the folder where all goes is needed, but for --cost")
    results = {}
    for name, some in studies(args, lambda here, work: PlanningStudy(here, work, args.minutes, bindings)):
        for study in some:
            study.make()
        results[name] = figures(some)
        show(name, results[name])
    by_figure = {key: {name: told[key] for name, told in results.items()} for key in results[name]}
    print(json.dumps(by_figure | _planning_cost.run(Console(width=160), args.sizes, args.quick)))


if __name__ == "__main__":
    main()
