"""Does a generative retriever learn to rank? nDCG@10 of test queries from random weights, with paired tests.

    python benchmarks/ranking.py ../shared/data/squad_dev ../shared/data/wordnet:20000 --work /tmp/ranking

For each collection (a folder, or a folder and how many of its passages) all methods learn from random
weights, on the same network (gin_configs/runs/ripor.gin) and with the same budget: as many steps as take
about --minutes on a processor's two cores. Every model has one such budget; those that begin with the weights
of another model, and docids that are made of a dual encoder's vectors, have had that model's before:

    dual encoder            in-batch negatives; its vector is the decoder's first state
    dual encoder, distilled goes on from the dual encoder, with the teacher's scores of what it found
    atomic, naive           cross-entropy of the docids
    rq_8x256                cross-entropy; docids of the dual encoder's vectors, as in all the following
    rq_8x256 + LTRGR        goes on from it, with its own beams as negatives: a pairwise margin
    rq_8x256 + DPO          the same negatives; the model itself, frozen, is the reference
    RIPOR, 1 and 2 rounds   `retrieval-jax ripor`: begins as the dual encoder; a teacher's scores.
                            Each round has half a budget
    teacher                 of these: BM25 and the dual encoder, fused with weights chosen on dev queries

Test queries are read when all is trained; settings were chosen on dev queries of SQuAD. Differences are to
rq_8x256 and to the dual encoder, with p of the paired randomisation test after Holm's correction over the
methods, for each collection and baseline apart; several --seeds are averaged for each query. What is finished
is kept in --work. Prints a table, then one line of JSON.
"""

import argparse
import json

import _quiet  # noqa: F401
import numpy as np
from _measure import values_of_queries
from _study import QUICK, Study, add_options, studies
from _verbs import parse
from rich.console import Console
from rich.table import Table

from retrieval_jax.core.workspace import Workspace
from retrieval_jax.evaluation import significance

RQ = "rq_8x256"
NETWORK = "T5Config.num_encoder_layers=0"
RANK = ["train.batch_size=64", "DataConfig.negatives=7", "learning_rate.peak=1e-5"]  # as in runs/ripor.gin
RANK += ["DataConfig.token_dropout={'labelled': 0.1}"]
SEARCHERS = {
    "BM25": "bm25",
    "dual encoder": "ripor_dense",
    "dual encoder, distilled": "distilled",
    "atomic": "atomic",
    "naive": "naive",
    RQ: RQ,
    f"{RQ} + LTRGR": "ltrgr",
    f"{RQ} + DPO": "dpo",
    "teacher": "ripor_teacher",
    "RIPOR, 1 round": "ripor_1",
    "RIPOR, 2 rounds": "ripor_2",
}
BASELINES = {"over_cross_entropy": RQ, "over_dual_encoder": "dual encoder"}


class RankingStudy(Study):
    """All methods on one collection, with one seed.

    Args:
      here: the bindings that name the collection, its work folder and the seed.
      work: the work folder.
      minutes: the budget.
      rounds: of RIPOR.
      bindings: of the command line.
    """

    def __init__(self, here: list[str], work: Workspace, minutes: float, rounds: int, bindings: list[str]):
        super().__init__([*here, NETWORK], work, minutes, bindings)
        self.rounds = rounds
        late = [f"ripor_{n}" for n in range(rounds + 1, 3)]
        self.searchers = {method: name for method, name in SEARCHERS.items() if name not in late}

    def train(self, name: str, training: str, *settings: str, files: tuple[str, ...]) -> None:
        """Trains a model and indexes it."""
        model = f"MODEL_DIR={str(self.work.model(name))!r}"
        self.run("train", model, f"STEPS={self.steps(training)}", *settings, files=files)
        kind = "'exact'" if name == "distilled" else None
        self.run("index", model, f"make_index.name={name!r}", f"make_index.kind={kind}")

    def rank(self, name: str, task: str) -> None:
        """Goes on from the model that cross-entropy trained, with its own beams as negatives."""
        start = f"INITIAL_CHECKPOINT={str(self.work.model(RQ))!r}"
        beams = ["NEGATIVES='beams'", *(["SCORES='beams'"] if name == "dpo" else [])]
        files = ("runs/naive.gin", f"docids/{RQ}.gin", f"tasks/{task}.gin")
        self.train(name, "rank", start, *beams, *RANK, files=files)

    def make(self) -> None:
        """Makes all runs of the test queries."""
        steps = {"dense": self.steps("dense"), "seq2seq": 0, "rank": self.steps("rank", 0.5)}
        rounds = f"ripor.rounds={self.rounds}"
        self.run("ripor", f"ripor.steps={steps}", rounds, files=("runs/ripor.gin",))
        for kind in ("atomic", "naive"):
            self.run("docids", f"DOCIDS={kind!r}")
            self.train(kind, kind, files=(f"runs/{kind}.gin",))
        self.train(RQ, RQ, files=("runs/naive.gin", f"docids/{RQ}.gin"))
        of_rq = f"MODEL_DIR={str(self.work.model(RQ))!r}"
        self.run("index", of_rq, "make_index.name='rq_beams'", "make_index.beams=20")
        self.run("mine", "SEARCHER='rq_beams'", "mine.name='beams'")
        self.run(
            "score", "SEARCHER='rq_beams'", "score_pairs.candidates=('beams',)", "score_pairs.name='beams'"
        )
        self.rank("ltrgr", "ltrgr")
        self.rank("dpo", "ddro")
        goes_on = f"INITIAL_CHECKPOINT={str(self.work.model('ripor_dense'))!r}"
        found = [goes_on, "NEGATIVES='ripor_1'", "SCORES='ripor_1'", "DualEncoder.pooling='decoder'"]
        found += ["dense_kl.temperature=0.1", "learning_rate.peak=2e-5"]
        self.train("distilled", "distilled", *found, files=("runs/dual_encoder_distilled.gin",))
        for searcher in self.searchers.values():
            self.run("search", f"SEARCHER={searcher!r}", "SPLIT='test'")

    def measure(self) -> dict[str, np.ndarray]:
        """Gives the nDCG@10 of each test query, by method."""
        values = values_of_queries(self.work, self.searchers.values())
        return {method: values[searcher] for method, searcher in self.searchers.items()}


def figures(values: dict[str, np.ndarray]) -> dict:
    """Gives the means of a collection, and the differences to each baseline."""
    told = {"ndcg_at_10": {method: float(some.mean()) for method, some in values.items()}}
    for name, baseline in BASELINES.items():
        others = {method: some for method, some in values.items() if method != baseline}
        compared = significance.compare(values[baseline], others)
        told[name] = {method: [one.mean, one.p_holm] for method, one in compared.items()}
    return told


def show(results: dict[str, dict]) -> None:
    """Prints the table."""
    table = Table("collection", "method", "nDCG@10", "over rq_8x256", "p", "over dual encoder", "p")
    for collection, told in results.items():
        for method, value in told["ndcg_at_10"].items():
            cells = []
            for name in BASELINES:
                difference, p = told[name].get(method, (None, None))
                cells += ["", ""] if p is None else [f"{difference:+.3f}", f"{p:.1e}"]
            table.add_row(collection, method, f"{value:.3f}", *cells)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, minutes=2)
    parser.add_argument("--rounds", type=int, default=2, choices=(1, 2), help="of RIPOR")
    args, bindings = parse(parser)
    if args.quick:
        args.collections, args.minutes = ["python_docs"], 0.1
        bindings = [*QUICK, *bindings]

    def study(here: list[str], work: Workspace) -> RankingStudy:
        return RankingStudy(here, work, args.minutes, args.rounds, bindings)

    results = {}
    for name, some in studies(args, study):
        for study in some:
            study.make()
        measured = [study.measure() for study in some]
        results[name] = figures({m: np.mean([one[m] for one in measured], axis=0) for m in measured[0]})
        show({name: results[name]})
    by_figure = {key: {name: told[key] for name, told in results.items()} for key in results[name]}
    print(json.dumps(by_figure))


if __name__ == "__main__":
    main()
