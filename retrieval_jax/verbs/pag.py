"""The verb `pag`: a generative retriever that plans ahead, end to end (PAG, Zeng et al. 2024).

Each stage is a verb of its own, which is skipped where its work is already there, and goes on after a kill.
What it shares with `ripor` is there.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, ClassVar

import gin

from retrieval_jax.checkpoints import model_folder
from retrieval_jax.checkpoints.pretrained import fingerprint, open_pretrained
from retrieval_jax.core import configuration, paths, storage
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.values import Names, NonNegative, Positive
from retrieval_jax.data.collection import Collection
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.verbs.index import make_own_index
from retrieval_jax.verbs.mine import mine
from retrieval_jax.verbs.ripor import BEGAN_WITH, DENSE, RANK, SEQ2SEQ, RiporConfig, read_beginning
from retrieval_jax.verbs.sets import make_sets
from retrieval_jax.verbs.train import train

LEXICAL, QUERY, MERGE = "lexical", "query", "merge"
PLANNED = "planned"
HALVES = {"unplanned": "generative", "lexical": "lexical"}
"""What a planned search adds up, alone: how it is called -> its kind of searcher."""
STAGE = Names("a training of pag", (LEXICAL, QUERY, DENSE, SEQ2SEQ, RANK))
configuration.declare_scopes(Names("a model of pag", (LEXICAL, QUERY, DENSE, SEQ2SEQ, MERGE, RANK)))


@gin.configurable("pag")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagConfig(RiporConfig):
    """Trains a generative retriever that plans ahead: lexical and sequential models, merged, trained jointly.

    1. A lexical encoder, which may begin as a power of the tokens' inverse document frequencies:
       models/NAME_lexical.
    2. Set docids: the tokens of each passage that count most, sets/NAME.
    3. A lexical encoder whose passages are these sets, so that only its queries' side is trained; it goes on
       from the first one: models/NAME_query.
    4. As in `ripor`: a dense encoder, docids of its vectors, and cross-entropy: models/NAME_dense and
       NAME_seq2seq.
    5. The average of the weights of the lexical and of the last sequential model, models/NAME_0: a training
       of no steps.
    6. Rounds: negatives, a teacher's scores of them, and a joint training: models/NAME_1 and so on. Negatives
       are the teacher's own results at first, and then what the last model's planned search found.
    7. Searchers: NAME_0 and so on plan; of the last one, NAME_1_unplanned and NAME_1_lexical are the beam
       search and the sets alone, of the same network. Planned ones weigh the sequential score as dev queries
       say (`make_index.sequential_weight`); without dev queries, or where dev is the split to answer, as the
       joint training does.

    Trainings of 0 steps (lexical, query, seq2seq) are left out; without a lexical encoder, the head of NAME_0
    begins as `InitialCheckpoint` says. As in `ripor`, a stage whose work is there is skipped.

    Args:
      set_weights: what weighs the tokens of the sets: "bm25", "tf_idf", or "lexical", the lexical encoder.
    """

    verb: ClassVar[str] = "pag"

    name: str = "pag"
    set_weights: str = "bm25"
    steps: Mapping[Annotated[str, STAGE], NonNegative] | None = None
    rounds: NonNegative = 1
    mining_beams: Positive = 10

    @property
    def lexical(self) -> list[str]:
        """The names of the lexical encoders, as they are trained; the last one is merged."""
        return [f"{self.name}_{stage}" for stage in (LEXICAL, QUERY) if self.trains(stage)]

    def stages(self) -> list[tuple[str, Callable[[], object]]]:
        """Gives (what it makes, the function) of each stage, in their order."""
        collection, *others = super().stages()
        return [collection, *self.lexical_stages(), *others]

    def lexical_stages(self) -> list[tuple[str, Callable[[], object]]]:
        """Gives the stages that make the lexical half."""
        stages = []
        if self.trains(LEXICAL):
            stages.append(("the lexical encoder", functools.partial(self.train_lexical, LEXICAL)))
        stages.append(("sets of tokens", self.make_sets))
        if self.trains(QUERY):
            stages.append(("the weights of queries", functools.partial(self.train_lexical, QUERY)))
        return stages

    @property
    def sequential(self) -> str:
        """The name of the sequential model that is merged."""
        return f"{self.name}_{SEQ2SEQ}" if self.trains(SEQ2SEQ) else self.dense

    @property
    def generative(self) -> list[str]:
        """The names of the merged and of the jointly trained models, in the order in which they are made."""
        return [self.round(number) for number in range(self.rounds + 1)]

    def sequential_stages(self) -> list[tuple[str, Callable[[], object]]]:
        """See `RiporConfig.sequential_stages`."""
        stages = [("cross-entropy", self.train_sequential)] if self.trains(SEQ2SEQ) else []
        return [*stages, ("the average of both", self.merge)]

    def train_sequential(self) -> dict:
        """Trains a generative model that begins as the dense encoder."""
        self.note_beginning(self.sequential, self.dense)
        return self._train(SEQ2SEQ, self.sequential, self.docids, *super().settings(SEQ2SEQ, 0))

    def merge(self) -> dict:
        """Makes a model with the average of the sequential and the lexical model's weights."""
        folder, averaged = self.work.model(self.round(0)), self.averaged()
        if model_folder.is_untrained(folder) and read_beginning(folder) != averaged:
            paths.remove(folder)  # of older weights; there is no training in it to lose
        settings = [
            f"{MERGE}/learning_rate.steps = 0",
            f"{MERGE}/InitialCheckpoint.path = {str(self.work.model(self.sequential))!r}",
            f"{MERGE}/InitialCheckpoint.docid_centroids = {not self.trains(SEQ2SEQ)}",
        ]
        if self.lexical:
            lexical = str(self.work.model(self.lexical[-1]))
            settings.append(f"{MERGE}/InitialCheckpoint.averaged_with = {lexical!r}")
            settings.append(f"{MERGE}/InitialCheckpoint.lexical_idf = 0")
        with configuration.run_file(None, *settings), gin.config_scope(MERGE):
            made = train(model_dir=str(folder), docids=self.docids, steps=0)
        storage.write_json(folder / BEGAN_WITH, averaged)
        return made

    def averaged(self) -> dict[str, str]:
        """Gives the fingerprints of the models that are merged, by their names, and of the docids."""
        models = [self.work.model(name) for name in (self.sequential, *self.lexical[-1:])]
        fingerprints = {model.name: fingerprint(open_pretrained(model)) for model in models}
        return fingerprints | {"docids": DocidTable.open(self.work.docids(self.docids)).fingerprint()}

    def train_lexical(self, stage: str) -> dict:
        """Trains a lexical encoder; the one of the sets goes on from the first one, if there is one."""
        if stage == QUERY and self.trains(LEXICAL):
            self.note_beginning(self.lexical[1], self.lexical[0])
        with self.lexical_recipe(stage):
            return train(model_dir=str(self.work.model(f"{self.name}_{stage}")), docids=None)

    @contextlib.contextmanager
    def lexical_recipe(self, stage: str) -> Iterator[None]:
        """A context in which gin has the settings of the training of a lexical encoder (LEXICAL or QUERY)."""
        settings = [f"SETS = {self.name!r}"] if stage == QUERY else []
        if stage == QUERY and self.trains(LEXICAL):
            settings.append(f"INITIAL_CHECKPOINT = {str(self.work.model(self.lexical[0]))!r}")
            settings.append(f"{QUERY}/InitialCheckpoint.lexical_idf = 0")
        with configuration.run_file(None, *self._steps(stage), *settings), gin.config_scope(stage):
            yield

    def make_sets(self) -> dict:
        """Makes the set docids."""
        is_model = self.set_weights == LEXICAL
        weights = str(self.work.model(f"{self.name}_{LEXICAL}")) if is_model else self.set_weights
        return make_sets(name=self.name, weights=weights)

    def settings(self, stage: str, number: int) -> list[str]:
        """See `RiporConfig.settings`; a joint training reads the sets, and goes on with the head's gains."""
        return [
            *super().settings(stage, number),
            f"SETS = {self.name!r}",
            f"{RANK}/InitialCheckpoint.lexical_idf = 0",
        ]

    def index(self, model: str, name: str, kind: str = PLANNED, **settings: object) -> None:
        """Makes a searcher of a model: one that plans, or one of the halves (see HALVES)."""
        if kind != "generative":
            settings |= {"sets": self.name}
        if kind == PLANNED:
            settings |= self.weighed()
        make_own_index(kind, name=name, model_dir=str(self.work.model(model)), **settings)

    def weighed(self) -> dict:
        """Gives the settings of a planned searcher by which the sequential score has its weight."""
        if gin.get_bindings("make_index").get("sequential_weight") is not None:
            return {}
        if self.split != "dev" and Collection(self.work.collection).query_counts.get("dev"):
            return {"fit_split": "dev"}
        with gin.config_scope(RANK):
            trained = gin.get_bindings("joint_ranking").get("sequential_weight", 1.0)
        return {"fit_split": None, "sequential_weight": trained}

    def mine(self, number: int) -> dict:
        """Mines a round's negatives."""
        if number == 1:
            return mine(searcher=self.teacher_name, name=self.round(number), prefix_lengths=())
        return super().mine(number)

    def check(self) -> None:
        """See `RiporConfig.check`; the sets are not to be those of a model that is left out."""
        super().check()
        if self.set_weights == LEXICAL and not self.trains(LEXICAL):
            raise UserError("pag.set_weights: 'lexical', which has 0 steps in pag.steps: set them, or 'bm25'")

    def search(self) -> dict:
        """Makes the searchers of each model, and answers the queries with all of them."""
        for model in self.generative:
            self.index(model, model)
        last = self.generative[-1]
        for name, kind in HALVES.items():
            self.index(last, f"{last}_{name}", kind)
        return self.evaluate([self.dense, *self.generative, *(f"{last}_{name}" for name in HALVES)])


def pag(**values: object) -> dict:
    """Trains a generative retriever that plans ahead; see `PagConfig`, and `ripor` for values and result."""
    return PagConfig(**values).run()
