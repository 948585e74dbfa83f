"""The verb `ripor`: a generative retriever that learns to rank, end to end (RIPOR, Zeng et al. 2024).

Each stage is a verb of its own, which is skipped where its work is already there, and goes on after a kill.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import gin

from retrieval_jax.checkpoints import model_folder
from retrieval_jax.checkpoints.pretrained import fingerprint, open_pretrained
from retrieval_jax.core import configuration, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.values import Names, NonNegative, Positive
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.docids.kinds import docid_kind, has_centroids
from retrieval_jax.search.searcher import check_scores, searcher_class
from retrieval_jax.verbs.docids import make_docids
from retrieval_jax.verbs.evaluate import evaluate
from retrieval_jax.verbs.importing import import_collection
from retrieval_jax.verbs.index import make_own_index
from retrieval_jax.verbs.mine import mine
from retrieval_jax.verbs.score import score_pairs
from retrieval_jax.verbs.search import search
from retrieval_jax.verbs.train import train

DENSE, SEQ2SEQ, RANK = STAGES = ("dense", "seq2seq", "rank")
STAGE = Names("a training of ripor", STAGES)
configuration.declare_scopes(STAGE)
BM25 = "bm25"
BEGAN_WITH = "began_with.json"  # in a model's folder: the fingerprints of the models that it began with


@gin.configurable("ripor")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RiporConfig:
    """Trains a generative retriever to rank: dense encoder, docids of its vectors, then rounds of ranking.

    1. A dense encoder whose vector is the decoder's first state: models/NAME_dense.
    2. Docids by residual quantisation of its vectors. The generative retriever begins as this encoder, with
       the centroids as the embeddings of its codes.
    3. Cross-entropy of the docids (of synthetic queries, where the mixture has them): models/NAME_0. With 0
       steps it is left out.
    4. Rounds: negatives that the last model's beams hold (in the first round without cross-entropy, those of
       the dense encoder), a teacher's scores of them, and a training that ranks by these: models/NAME_1 and
       so on, with searchers and runs of these names.

    A stage whose work is there is skipped, and the same command goes on after a kill. A model that began with
    other weights than the stage before it has now is refused.

    Args:
      source: the collection, as `import` takes it.
      work_dir: its work folder; None is `work/NAME`.
      name: begins the names of all that is made.
      docids: the kind of docids, one that clusters vectors, and whose tokens have centroids.
      dense_encoder: a dual encoder in models/ to take instead of training one; its vector is the decoder's
        first state, too (DualEncoder.pooling).
      steps: training -> steps, where they differ from STEPS; a given --STEPS is for all. Each training has a
        gin scope of its name: --gin.rank/DataConfig.negatives=15 is for that one alone.
      rounds: how often negatives are mined and ranked.
      mining_beams: beams of the searches that mine, which answer every train query.
      teacher: a searcher in searchers/, whose scores are learned; None for BM25 fused with the dense encoder
        (a weighted sum of scores in 0 to 1, with weights chosen on dev queries).
      split: the queries to answer.
    """

    verb: ClassVar[str] = "ripor"

    source: str
    work_dir: str | None = None
    name: str = "ripor"
    docids: str | None = "rq_8x256"
    dense_encoder: str | None = None
    steps: Mapping[Annotated[str, STAGE], NonNegative] | None = None
    rounds: NonNegative = 2
    mining_beams: Positive = 20
    teacher: str | None = None
    split: str = "test"

    @functools.cached_property  # it reads the collection's manifest
    def work(self) -> Workspace:
        """Where everything lies."""
        return Workspace.for_source(self.source, self.work_dir)

    @property
    def dense(self) -> str:
        """The name of the dense encoder's model and searcher."""
        return self.dense_encoder or f"{self.name}_{DENSE}"

    @property
    def teacher_name(self) -> str:
        """The name of the searcher whose scores are learned."""
        return self.teacher or f"{self.name}_teacher"

    @property
    def generative(self) -> list[str]:
        """The names of the generative models and searchers, in the order in which they are trained."""
        return [self.round(n) for n in range(0 if self.trains(SEQ2SEQ) else 1, self.rounds + 1)]

    def trains(self, stage: str) -> bool:
        """Whether there is a training of this name: it has other than 0 steps."""
        return (self.steps or {}).get(stage) != 0

    def round(self, number: int) -> str:
        """Gives the name of what a round makes."""
        return f"{self.name}_{number}"

    def stages(self) -> list[tuple[str, Callable[[], object]]]:
        """Gives (what it makes, the function) of each stage, in their order."""
        stages = [("the collection", self.import_collection)]
        if self.dense_encoder is None:
            stages.append(("the dense encoder", self.train_dense))
        stages += [
            ("its searcher, and the teacher", self.index_teacher),
            ("docids of its vectors", self.make_docids),
            *self.sequential_stages(),
        ]
        for number in range(1, self.rounds + 1):
            of_round = functools.partial(functools.partial, number=number)
            stages += [
                (f"round {number}: negatives", of_round(self.mine)),
                (f"round {number}: the teacher's scores", of_round(self.score)),
                (f"round {number}: ranking", of_round(self.train_generative, RANK)),
            ]
        return [*stages, ("search", self.search)]

    def sequential_stages(self) -> list[tuple[str, Callable[[], object]]]:
        """Gives the stages between the docids and the first round."""
        if not self.trains(SEQ2SEQ):
            return []
        return [("cross-entropy", functools.partial(self.train_generative, SEQ2SEQ, 0))]

    def import_collection(self) -> dict:
        """Imports the collection.

        Raises:
          UserError: there are rounds, and no train queries to mine negatives for.
        """
        made = import_collection()
        if self.rounds and not Collection(self.work.collection).query_counts.get("train"):
            raise UserError(
                f"{self.work.collection}: has no train queries, for which each round mines negatives: add "
                f"queries.train.tsv, or --gin.{self.verb}.rounds=0"
            )
        return made

    def train_dense(self) -> dict:
        """Trains the dense encoder."""
        return self._train(DENSE, self.dense, docids=None)

    def index_teacher(self) -> None:
        """Makes the dense encoder's searcher, and the teacher, unless it is there by a name of its own."""
        model = str(self.work.model(self.dense))
        make_own_index("exact", name=self.dense, model_dir=model)
        if self.teacher is None:
            make_own_index(BM25, name=BM25, model_dir=None)
            make_own_index(
                "fused",
                name=self.teacher_name,
                model_dir=None,
                parts=(BM25, self.dense),
                fusion="min_max",
                fit_split=None if self.split == "dev" else "dev",
            )

    def make_docids(self) -> dict:
        """Makes docids of the dense encoder's vectors."""
        return make_docids(kind=self.docids, embeddings=str(self.work.model(self.dense)))

    def train_generative(self, stage: str, number: int) -> dict:
        """Trains a generative model that begins as the last one, or as the dense encoder."""
        self.note_beginning(self.round(number), self.before(number))
        return self._train(stage, self.round(number), self.docids, *self.settings(stage, number))

    def before(self, number: int) -> str:
        """Gives the name of the model that the model of a round (by its number) begins with."""
        before = self.round(number - 1)
        return before if before in self.generative else self.dense

    def note_beginning(self, name: str, before: str) -> None:
        """Notes the weights that a model begins with, in its folder.

        Args:
          name: of the model.
          before: the name of the model with whose weights it begins.

        Raises:
          UserError: it is trained, and began with others.
        """
        folder = self.work.model(name)
        now = {before: fingerprint(open_pretrained(self.work.model(before)))}
        if not model_folder.is_begun(folder):
            storage.write_json(folder / BEGAN_WITH, now)
        elif read_beginning(folder) not in (None, now):
            raise UserError(
                f"{folder}: began with other weights of {before} than there are now: delete this folder, "
                f"or give all a new {self.verb}.name"
            )

    def settings(self, stage: str, number: int) -> list[str]:
        """Gives the gin bindings of a generative model's training: what it begins with and what it reads."""
        before = self.before(number)
        settings = [f"INITIAL_CHECKPOINT = {str(self.work.model(before))!r}"]
        settings += [f"InitialCheckpoint.docid_centroids = {before == self.dense}"]
        if stage == RANK:
            of_round = self.round(number)
            settings += [f"NEGATIVES = {of_round!r}", f"SCORES = {of_round!r}"]
        return settings

    def index(self, model: str, name: str, **settings: object) -> None:
        """Makes a searcher of a generative model."""
        make_own_index("generative", name=name, model_dir=str(self.work.model(model)), **settings)

    def mine(self, number: int) -> dict:
        """Mines a round's negatives."""
        before = self.round(number - 1)
        if before not in self.generative:
            return mine(searcher=self.dense, name=self.round(number), prefix_lengths=())
        beams = f"{before}_beams"
        self.index(before, beams, beams=self.mining_beams)
        return mine(searcher=beams, name=self.round(number))

    def score(self, number: int) -> dict:
        """Lets the teacher score a round's negatives."""
        of_round = self.round(number)
        return score_pairs(searcher=self.teacher_name, candidates=(of_round,), name=of_round)

    def search(self) -> dict:
        """Makes a searcher of each generative model, and answers the queries with all searchers."""
        for name in self.generative:
            self.index(name, name)
        return self.evaluate([self.dense, *self.generative])

    def evaluate(self, names: Sequence[str]) -> dict:
        """Answers the queries with searchers, BM25 and the teacher, and evaluates them."""
        for name in ([] if self.teacher else [BM25, self.teacher_name]) + [*names]:
            search(name=name, split=self.split)
        return evaluate(split=self.split)

    def check(self) -> None:
        """Raises UserError if there is nothing to train, no docids to begin with, or no such teacher."""
        if self.docids is None:
            raise UserError("DOCIDS: None, and a generative retriever needs docids: --DOCIDS=rq_8x256")
        begins = gin.get_bindings("InitialCheckpoint").get("docid_centroids", True)
        if begins and not has_centroids(docid_kind(self.docids)):
            raise UserError(
                f"DOCIDS: {self.docids} docids have no centroids, as which their embeddings begin: "
                "--DOCIDS=rq_8x256"
            )
        if not self.generative:
            raise UserError("ripor.rounds: 0, and no cross-entropy before it: train at least one of them")
        if self.teacher not in (None, self.dense):  # which is made here
            kind = storage.read_manifest(self.work.searcher(self.teacher), "index")["kind"]
            check_scores(searcher_class(kind), self.teacher, f"{self.verb}.teacher")

    def run(self) -> dict:
        """Runs all stages; gives what each made, by its name."""
        self.check()
        stages, made = self.stages(), {}
        for number, (what, stage) in enumerate(stages, 1):
            log(f"{number}/{len(stages)} {what}")
            made[what] = stage()
        return made

    def _train(self, stage: str, name: str, docids: str | None, *settings: str) -> dict:
        """Does a training in its scope, with gin bindings of its own, and makes the model of a name."""
        with configuration.run_file(None, *self._steps(stage), *settings), gin.config_scope(stage):
            return train(model_dir=str(self.work.model(name)), docids=docids)

    def _steps(self, stage: str) -> list[str]:
        """Gives the setting of a training's steps, if it has its own."""
        return [f"STEPS = {self.steps[stage]}"] if self.steps and stage in self.steps else []


def read_beginning(folder: Path) -> dict[str, str] | None:
    """Reads what a model began with.

    Args:
      folder: the model's.

    Returns:
      The fingerprints of the models, by their names; None where they were not noted.

    Raises:
      UserError: the file is damaged.
    """
    path = folder / BEGAN_WITH
    return storage.read_json(path, "delete the folder") if path.exists() else None


def ripor(**values: object) -> dict:
    """Trains a generative retriever to rank; see `RiporConfig`.

    Args:
      **values: of RiporConfig's attributes; those that are left out are gin's.

    Returns:
      What each stage made, by its name.

    Raises:
      UserError: there is nothing to train, no docids to begin with, no such teacher, or no train queries for
        a round; or a model began with other weights than the stage before it has now.
    """
    return RiporConfig(**values).run()
