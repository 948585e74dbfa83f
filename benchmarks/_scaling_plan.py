"""What the study of scale trains: its methods, the points of its plan, and how long they take."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from retrieval_jax.examples.mixtures import PAPER_MIXTURES

MAIN = "3b"  # the mixture with which all methods are compared
REFERENCE = "naive"  # whose floating-point operations the others get, where these are to be equal
WIDTH = 256
BATCH = 128
GROWTH = 0.5  # steps grow with the square root of the corpus: the paper's 1M on 100k passages, 9M on 8.8M


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to search.

    Attributes:
      kind: of its searcher.
      files: the gin files of its training; none for a searcher without a model.
      settings: bindings of its training, and of the searcher that a verb of several trainings makes.
      docids: the kind of docids that it writes.
      vectors: whether these cluster a dual encoder's vectors.
      verb: that trains it.
      stages: of a verb of several trainings: each training's steps, as a share of those of the budget.
      mixtures: the mixtures that it is trained on; None: it is not trained.
      expansion: whether it reads synthetic queries with the passages.
      seconds: that a step of the budget takes on two CPU cores without other work.
    """

    kind: str = "generative"
    files: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    docids: str | None = None
    vectors: bool = False
    verb: str = "train"
    stages: Mapping[str, float] = dataclasses.field(default_factory=dict)
    mixtures: tuple[str, ...] | None = (MAIN, "6b")
    expansion: bool = False
    seconds: float = 0.0


def _sequential(docids: str, *settings: str, **values: object) -> Method:
    files = ("runs/naive.gin", f"docids/{docids}.gin")
    return Method(files=files, settings=settings, docids=docids, **{"seconds": 0.08, **values})


ROWS = ("1a", "2a", MAIN, "6b")
METHODS = {
    "BM25": Method("bm25", mixtures=None),
    "BM25 + doc2query": Method("bm25", mixtures=None, expansion=True),
    "dual encoder": Method("exact", ("runs/dual_encoder.gin",), mixtures=(MAIN,), seconds=0.06),
    "atomic": Method(files=("runs/atomic.gin",), docids="atomic", mixtures=ROWS, seconds=0.06),
    "naive": _sequential("naive", mixtures=ROWS, seconds=0.14),
    "semantic": _sequential("semantic", vectors=True, mixtures=ROWS),
    "2-D + PAWA": _sequential("semantic_2d", "T5Config.pawa_layers=1", vectors=True, seconds=0.8),
    "rq": _sequential("rq_8x256", vectors=True, seconds=0.1),
    # A batch of "rank" has half as many examples; together the trainings have as many as the budget.
    "rq + ranking": Method(
        files=("runs/ripor.gin",),
        settings=("make_index.beams=40",),  # as all others
        docids="rq_8x256",
        verb="ripor",
        stages={"dense": 0.5, "seq2seq": 0.0, "rank": 1.0},
        mixtures=(MAIN,),
        seconds=0.3,
    ),
    "rq + planning": Method(  # as the run file has them for 2,067 passages
        "planned",
        files=("runs/pag.gin",),
        docids="rq_8x256",
        verb="pag",
        stages={"lexical": 0.0, "query": 0.09, "dense": 0.88, "seq2seq": 0.0, "rank": 0.06},
        mixtures=(MAIN,),
        seconds=0.2,
    ),
}
DENSE = "dual encoder"
GENERATIVE = tuple(name for name, method in METHODS.items() if method.docids)
COUNTED = [name for name in GENERATIVE if name != REFERENCE and METHODS[name].verb == "train"]
"""Methods with the budget "flops". A dual encoder without layers has next to no matrix products."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One searcher to measure.

    Attributes:
      size: the passages of its corpus.
      method: its name in METHODS.
      mixture: the paper's row that it is trained on; None for a searcher without a model.
      budget: what is equal among the methods of a corpus: "examples", or "flops".
      width: of the network.
      seed: of the training.
    """

    size: int
    method: str
    mixture: str | None = None
    budget: str = "examples"
    width: int = WIDTH
    seed: int = 0

    @property
    def name(self) -> str:
        """Its facts, as the name of its model begins."""
        method = self.method.lower().replace(" + ", "_").replace(" ", "_").replace("-", "")
        return f"{method}_{self.mixture}_{self.budget}_{self.width}_{self.seed}"

    @property
    def reads_synthetic(self) -> bool:
        """Whether it needs synthetic queries."""
        return METHODS[self.method].expansion or "d2q" in PAPER_MIXTURES.get(self.mixture, ())


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the command line chose.

    Attributes:
      sizes: passages of the corpora.
      methods, mixtures, budgets, widths: of what is trained.
      fixed: networks of all widths are compared on the corpus whose number of passages is nearest to it.
      seeds: how many.
      steps: of a training on a thousand passages.
    """

    sizes: Sequence[int]
    methods: Sequence[str]
    mixtures: Sequence[str]
    budgets: Sequence[str]
    widths: Sequence[int]
    fixed: int
    seeds: int
    steps: int

    def steps_of(self, size: int) -> int:
        """Gives the steps of a training where examples are equal."""
        return max(round(self.steps * (size / 1000) ** GROWTH), 1)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
      queries, dev: test queries, the same at every size, and dev queries.
      scored: test queries whose relevant passage is scored against random ones.
      draws, negatives: of random passages.
      generated: synthetic queries a passage.
      generator_steps: of the training of their generator.
    """

    queries: int = 500
    dev: int = 100
    scored: int = 64
    draws: int = 10
    negatives: int = 256
    generated: int = 10
    generator_steps: int = 800


def points(choice: Choice) -> Iterator[Point]:
    """Yields the points in the order in which they are measured: small corpora first, each seed in turn."""
    for seed in range(choice.seeds):
        for size in sorted(choice.sizes):
            for name in choice.methods:
                yield from _of_method(choice, size, name, seed)
        fixed = min(choice.sizes, key=lambda size: abs(size - choice.fixed))
        for width in choice.widths:
            for name in (name for name in ("atomic", "naive") if name in choice.methods):
                if width != WIDTH:
                    yield Point(fixed, name, MAIN, width=width, seed=seed)


def _of_method(choice: Choice, size: int, name: str, seed: int) -> Iterator[Point]:
    method = METHODS[name]
    if method.mixtures is None:
        if seed == 0:
            yield Point(size, name)
        return
    for mixture in (row for row in method.mixtures if row in choice.mixtures):
        for budget in choice.budgets:
            if budget == "examples" or (mixture == MAIN and name in COUNTED):
                yield Point(size, name, mixture, budget, seed=seed)


def seconds_of(point: Point, choice: Choice, queries: int, scored: int) -> float:
    """Estimates the seconds that a point takes: training, compiling, searching and scoring.

    Args:
      point: the point.
      choice: for its steps.
      queries: that are answered.
      scored: pairs of a query and a docid that are scored.
    """
    method = METHODS[point.method]
    if method.mixtures is None:
        return 3.0
    wide = max(point.width / WIDTH, 0.3) ** 1.5
    a_step = METHODS[REFERENCE if point.budget == "flops" else point.method].seconds * wide
    if method.docids == "atomic":
        a_step += 2.0e-6 * point.size * wide
    searching = 0.02 * queries + 4e-4 * scored if method.docids else 5.0
    if method.docids == "atomic":
        searching /= 10
    compiled = 1 + sum(share > 0 for share in method.stages.values())
    return 15 * compiled + choice.steps_of(point.size) * a_step + searching


def generating_seconds(size: int, queries: int) -> float:
    """Estimates the seconds of `queries` synthetic queries for each of `size` passages."""
    return 0.0015 * size * queries


def generator_seconds(steps: int) -> float:
    """Estimates the seconds of training the query generator."""
    return 0.7 * steps
