"""Initial weights: a model's parameters begin with weights of another program, as far as both have them."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import flax.linen as nn
import gin
import numpy as np
from flax.traverse_util import flatten_dict

from retrieval_jax.checkpoints import hub, tokenizer
from retrieval_jax.checkpoints.averaging import AVERAGED_WITH, UNSEEN, averaged
from retrieval_jax.checkpoints.model_folder import boxed_params
from retrieval_jax.checkpoints.parameter_names import Module, grouped, module_names, shortened
from retrieval_jax.checkpoints.pretrained import OUTPUT, T5X, Pretrained, open_pretrained
from retrieval_jax.checkpoints.weights import LazyArray, placed, stacked
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.core.values import Names, NonNegativeFloat, PositiveFloat
from retrieval_jax.models.dual_encoder import DualEncoder
from retrieval_jax.models.dual_encoder_network import split_tower
from retrieval_jax.models.layers import STACK_AXIS, T5Config
from retrieval_jax.models.stacks import is_stacked

TEXT_TOKENS, TARGET_TOKENS = "token_embedder/embedding", "decoder_token_embedder/embedding"
GAIN = "lexical_head/gain"
VOCAB_AXES = {TEXT_TOKENS: 0, OUTPUT: 1}
SIZES = ("emb_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers")
WithVocabulary = Names(
    "a parameter with a row or a column for each token",
    ("token_embedder", "token_embedder/embedding", "decoder", "decoder/logits_dense", OUTPUT),
)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class InitialCheckpoint:
    """The weights that training begins with: T5X's, Hugging Face's, or those of a model folder.

    Every parameter of the model must be among the weights with the same shape, and every array of the weights
    among the parameters, with the exceptions that are named here. Names are T5X's names of parameters or of
    modules ("decoder", "decoder/logits_dense").

    Attributes:
      path: the folder or file of the weights (also gs://…), or `hf:ORG/NAME` or `hf:ORG/NAME@REVISION` on the
        Hugging Face hub; None: everything begins at random.
      averaged_with: other weights (as `path`) of a network of the same sizes: an array that both have begins
        as the mean of the two, and one that only one has as it is there. PAG (Zeng et al. 2024, section 3.3)
        merges a sequential and a lexical model so. None: no others.
      missing_ok: parameters that begin at random where the weights lack them or have another shape of them.
      unexpected_ok: parameters of the weights that the model lacks, and that are left out.
      resize_vocab: parameters whose axis of the vocabulary may have another size: the first rows are read,
        and additional ones begin at random.
      docid_centroids: whether the embeddings of docid tokens begin as the centroids that the docids were made
        of, as decoder inputs and as output matrix (RIPOR, Zeng et al. 2024, section 3.3). Tokens that stand
        for no centroid begin at random, but for the start token, which begins as it is in the weights.
      docid_scale: what the centroids are multiplied by.
      docid_input_scale: what they are multiplied by as decoder inputs; None: `docid_scale`. With 0 the
        decoder's states begin alike at all positions, so that sums of logits begin as the dot products of the
        vectors (which the inputs else change, through the decoder's residual stream).
      lexical_idf: the power of the inverse document frequencies of the collection's tokens that the gains of
        a lexical head begin as, whatever the weights have; 0: they begin as the weights have them, else at 1.
        With 1 they are BM25's. Above 1 frequent tokens count less: a vocabulary's pieces have neither stop
        words nor stems.
    """

    path: str | None = None
    averaged_with: str | None = None
    missing_ok: Sequence[Annotated[str, Module]] = ()
    unexpected_ok: Sequence[str] = ()
    resize_vocab: Sequence[Annotated[str, WithVocabulary]] = ()
    docid_centroids: bool = False
    docid_scale: PositiveFloat = 1.0
    docid_input_scale: NonNegativeFloat | None = None
    lexical_idf: NonNegativeFloat = 0.0

    def __post_init__(self):
        if self.averaged_with and not self.path:
            raise UserError(
                f"{AVERAGED_WITH}: {self.averaged_with}, and no weights to average it with: "
                "--INITIAL_CHECKPOINT=…"
            )

    @functools.cached_property
    def located(self) -> hub.Located | None:
        """Where the weights lie, fetched from the hub where `path` names a repository; None without weights.

        Raises:
          UserError: the weights cannot be fetched.
        """
        return hub.locate(self.path, "INITIAL_CHECKPOINT") if self.path else None

    @functools.cached_property
    def name(self) -> str | None:
        """The name that the model's folder records: `path`, or the repository with its commit.

        The weights are not downloaded for it.

        Raises:
          UserError: the hub does not tell the commit.
        """
        if "located" in vars(self) or self.path is None:
            return self.located and self.located.name
        return hub.name_with_commit(self.path, "INITIAL_CHECKPOINT")

    @property
    def averaged_name(self) -> str | None:
        """`name` of the weights that these are averaged with."""
        return self.averaged_with and hub.name_with_commit(self.averaged_with, AVERAGED_WITH)

    @property
    def input_scale(self) -> float:
        """What the centroids are multiplied by as decoder inputs."""
        return self.docid_scale if self.docid_input_scale is None else self.docid_input_scale

    @property
    def centroid_scales(self) -> float | list[float] | None:
        """What model.json says of the centroids: their scale, or [scale, scale as inputs]; None for none."""
        if not self.docid_centroids:
            return None
        both = [self.docid_scale, self.docid_input_scale]
        return self.docid_scale if self.docid_input_scale is None else both

    def arrays_for(
        self,
        model,
        vocabulary: Path | None = None,
        centroids: Mapping[int, LazyArray] | None = None,
        gains: LazyArray | None = None,
    ) -> dict[str, LazyArray]:
        """Matches the weights with a model's parameters.

        A dual encoder for which no prompts are set takes those of the weights, which were trained with them.

        Args:
          model: the model that is to be trained.
          vocabulary: the SentencePiece model that it reads; None skips the comparison with the weights' own.
          centroids: {docid token: n×E, what this token and the n - 1 after it begin as}, where
            `docid_centroids` is set.
          gains: V, what the gains of a lexical head begin as, where `lexical_idf` is set.

        Returns:
          {parameter: lazy array}, for the parameters that do not begin at random. Nothing is read yet.

        Raises:
          UserError: the weights do not fit, with everything that is missing, unexpected or of another shape,
            or another vocabulary lies with them; or the centroids are not as wide as the model's embeddings.
        """
        pretrained = self._opened(vocabulary) if self.path else None
        arrays = self._pretrained_arrays(pretrained, model) if pretrained else {}
        if self.docid_centroids:
            arrays |= self._token_arrays(model, centroids or {}, arrays.get(TARGET_TOKENS))
        if self.lexical_idf:
            names = [name for name in parameters(model) if split_tower(name)[1] == GAIN]
            if not names:
                raise UserError(
                    "InitialCheckpoint.lexical_idf: the model has no lexical head: set "
                    "T5Config.lexical_head, or train.retriever=@LexicalEncoder"
                )
            arrays |= dict.fromkeys(names, gains)
        return arrays

    def _opened(self, vocabulary: Path | None) -> Pretrained:
        """Opens the weights, averaged with the others where there are any."""
        pretrained = open_pretrained(self.located.path)
        if mismatch := vocabulary and self._other_vocabulary(pretrained, vocabulary):
            commit, file = self.located.commit, pretrained.vocabulary or "…/sentencepiece.model"
            raise UserError(
                f"INITIAL_CHECKPOINT: {mismatch}: import the collection with theirs, "
                f"--VOCABULARY={self.name if commit else file}"
            )
        if self.averaged_with is None:
            return pretrained
        located = hub.locate(self.averaged_with, AVERAGED_WITH)
        others = open_pretrained(located.path, AVERAGED_WITH)
        if mismatch := vocabulary and self._other_vocabulary(others, vocabulary):
            raise UserError(f"{AVERAGED_WITH}: {mismatch}: average models of one vocabulary")
        return averaged(pretrained, others)

    def _pretrained_arrays(self, pretrained: Pretrained, model) -> dict[str, LazyArray]:
        self._check_unused(pretrained)
        match = self.match(pretrained, model)
        if mismatch := match.mismatch(pretrained.path):
            raise UserError(mismatch)
        if isinstance(model, DualEncoder):
            model.inherit_prompts(pretrained.settings)
        messages = [f"{pretrained.path}: {pretrained.format}'s weights, {len(match.arrays)} arrays are read"]
        messages += [f"averaged with {self.averaged_with}"] if self.averaged_with else []
        for what, names in (("begin at random", match.random), ("are not used", match.unused)):
            if names:
                messages.append(f"{what}: {', '.join(match.modules(names))}")
        log("; ".join(messages))
        return match.arrays

    def _token_arrays(
        self, model, centroids: Mapping[int, LazyArray], pretrained: LazyArray | None
    ) -> dict[str, LazyArray]:
        """Makes the parameters with a row or a column for each docid token, as `docid_centroids` says.

        Of the embedding in the weights, where there is one, the row of the start token stays.
        """
        width = model.config.emb_dim
        for rows in centroids.values():
            if rows.shape[1] != width:
                raise UserError(
                    f"InitialCheckpoint.docid_centroids: the centroids have {rows.shape[1]} dimensions, and "
                    f"the model's embeddings {width}: make the docids of vectors of {width} dimensions, as a "
                    "dual encoder of this size gives"
                )
        start, size = {0: pretrained.resized(0, 1)} if pretrained else {}, model.config.output_size
        inputs, outputs = (
            {token: rows.scaled(scale) for token, rows in centroids.items()}
            for scale in (self.input_scale, self.docid_scale)
        )
        made = {TARGET_TOKENS: placed(inputs | start, size), OUTPUT: placed(outputs, size).transposed()}
        count = sum(rows.shape[0] for rows in centroids.values())
        log(
            f"decoder_token_embedder, decoder/logits_dense: {count} docid tokens begin as their centroids, "
            f"times {self.docid_scale}"
            + ("" if self.docid_input_scale is None else f" ({self.docid_input_scale} as inputs)")
        )
        return {name: made[name] for name in made.keys() & parameters(model).keys()}

    def give_prompts(self, model: DualEncoder) -> None:
        """Gives a dual encoder for which no prompts are set those of the weights, as `arrays_for` does."""
        if self.located:
            model.inherit_prompts(open_pretrained(self.located.path).settings)

    def _other_vocabulary(self, pretrained: Pretrained, vocabulary: Path) -> str | None:
        """Tells how the vocabulary is another one than that of the weights; None where it is theirs."""
        extended = has_prefix(TEXT_TOKENS, self.resize_vocab)
        mismatch = tokenizer.difference(pretrained.path, pretrained.vocabulary, vocabulary, extended)
        return mismatch and f"{vocabulary} {mismatch}"

    def _check_unused(self, pretrained: Pretrained) -> None:
        """Raises UserError for a name in `unexpected_ok` that neither the weights nor any network has."""
        theirs = {split_tower(name)[1] for name in pretrained.arrays}
        known = Names(f"a parameter or a module of {pretrained.path}", (*module_names(), *theirs))
        for name in self.unexpected_ok:
            if not known.holds(name) and not any(has_prefix(one, [name]) for one in theirs):
                raise UserError(
                    f"InitialCheckpoint.unexpected_ok: {name!r} is not {known.near(name)}: set one that is"
                )

    def match(self, pretrained: Pretrained, model) -> "Match":
        """Compares names and shapes of the weights with those of a model's parameters."""
        match, used = Match(), set()
        theirs = dict(pretrained.arrays)
        own_outputs = model.config.output_size is not None
        if own_outputs and pretrained.network.get("output_size") is None and theirs.pop(OUTPUT, None):
            match.unused.append(OUTPUT)  # a softmax over texts, be they as many as the docids by chance
        for name, shape in parameters(model).items():
            tower, bare = split_tower(name)
            layers = layer_names(bare, model.config)
            sources = [f"{tower}{layer}" if f"{tower}{layer}" in theirs else layer for layer in layers]
            missing = [source for source in sources if source not in theirs]
            if missing and has_prefix(bare, self.missing_ok):
                match.random.append(bare)
                if bare == TARGET_TOKENS and TEXT_TOKENS in theirs:
                    # Token 0, which starts every target, is the one that the decoder of the weights has read.
                    match.arrays[name] = theirs[TEXT_TOKENS].resized(0, 1).resized(0, shape[0])
                continue
            if missing:
                match.missing += missing
                continue
            used |= set(sources)
            parts = [theirs[source] for source in sources]
            array = stacked(parts, STACK_AXIS) if is_stacked(tuple(bare.split("/"))) else parts[0]
            if differ_in_vocabulary(bare, array.shape, shape) and has_prefix(bare, self.resize_vocab):
                axis = VOCAB_AXES[bare]
                array = array.resized(axis, shape[axis])
            if array.shape == shape:
                match.arrays[name] = array
            elif has_prefix(bare, self.missing_ok):
                match.random.append(bare)
            else:
                match.misshaped.append((bare, array.shape, shape))
        left = theirs.keys() - used
        match.unused += sorted(name for name in left if has_prefix(split_tower(name)[1], self.unexpected_ok))
        match.unexpected = sorted(left - set(match.unused))
        sizes = [vars(config) for config in (T5Config(**pretrained.network), model.config)]
        match.sizes = [
            f"{name} {sizes[0][name]} ({sizes[1][name]} here)"
            for name in (*SIZES, *UNSEEN)
            if sizes[0][name] != sizes[1][name]
        ]
        known = pretrained.format != T5X  # whose checkpoints are arrays alone
        match.other_network = known and any(sizes[0][name] != sizes[1][name] for name in UNSEEN)
        return match


@dataclasses.dataclass
class Match:
    """How weights and a model compare.

    Attributes:
      arrays: the arrays that the model takes, by the names of its parameters.
      random: parameters that begin at random.
      unused: arrays of the weights that are left out.
      missing: parameters that the weights lack and that must not be missing.
      unexpected: arrays that the model lacks and that must not be left out.
      misshaped: (name, shape in the weights, shape in the model).
      sizes: settings of the network that differ, in words.
      other_network: whether a setting differs that no array's shape shows.
    """

    arrays: dict[str, LazyArray] = dataclasses.field(default_factory=dict)
    random: list[str] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    misshaped: list[tuple[str, tuple, tuple]] = dataclasses.field(default_factory=list)
    sizes: list[str] = dataclasses.field(default_factory=list)
    other_network: bool = False

    def mismatch(self, path: object, trains: bool = True) -> str | None:
        """Describes in one line all that does not fit, and how to train all the same.

        Args:
          path: where the weights lie.
          trains: whether the model is to be trained; a converted model must fit as it is.

        Returns:
          The line; None where everything fits.
        """
        lists = {
            "is of": self.sizes,
            "lacks": grouped(self.missing),
            "has besides": grouped(self.unexpected),
            "has in another shape": grouped(
                f"{name} ({'×'.join(map(str, theirs))} there, {'×'.join(map(str, ours))} here)"
                for name, theirs, ours in self.misshaped
            ),
        }
        if not (self.missing or self.unexpected or self.misshaped or self.other_network):
            return None
        found = "; ".join(f"{what} {shortened(names)}" for what, names in lists.items() if names)
        if not trains:
            return f"{path} {found}: it is another model's; `retrieval-jax train` can begin with a part of it"
        if self.sizes:
            return f"INITIAL_CHECKPOINT: {path} {found}: train a model of its sizes (--gin_file=models/…)"
        resized = [name for name, *shapes in self.misshaped if differ_in_vocabulary(name, *shapes)]
        new = [*self.missing, *(name for name, *_ in self.misshaped if name not in resized)]
        options = {
            "missing_ok": self.modules(new),
            "unexpected_ok": self.modules(self.unexpected),
            "resize_vocab": self.modules(resized),
        }
        flags = " ".join(
            f'--gin.InitialCheckpoint.{option}="{names!r}"' for option, names in options.items() if names
        )
        return f"INITIAL_CHECKPOINT: {path} {found}: accept it by {flags}"

    def modules(self, names: Iterable[str]) -> tuple[str, ...]:
        """Names the modules that hold the given arrays: a whole encoder where no array of it is used."""
        used = {split_tower(name)[1].partition("/")[0] for name in self.arrays}

        def top(name: str) -> str:
            bare = split_tower(name)[1]
            first = bare.partition("/")[0]
            return first if first not in used else bare.rpartition("/")[0] or bare

        return tuple(sorted({top(name) for name in names}))


def parameters(model) -> dict[str, tuple[int, ...]]:
    """Returns {name: shape} of a model's parameters."""
    made = nn.unbox(boxed_params(model))
    return {name: x.shape for name, x in flatten_dict(made, sep="/").items()}


def differ_in_vocabulary(name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    """Whether two shapes of a parameter differ in the size of the vocabulary alone."""
    axis = VOCAB_AXES.get(name)
    return theirs != ours and axis is not None and np.delete(theirs, axis) == np.delete(ours, axis)


def layer_names(name: str, config: T5Config) -> list[str]:
    """Returns the names of the layers' parameters that a scanned stack's array holds; else the name alone."""
    parts = name.split("/")
    if not is_stacked(tuple(parts)):
        return [name]
    counts = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    count = counts.get(parts[0], config.pawa_layers)
    return [f"{parts[0]}/layers_{i}/{'/'.join(parts[2:])}" for i in range(count)]


def has_prefix(name: str, modules: Sequence[str]) -> bool:
    """Whether a parameter is one of `modules`, or lies in one of them."""
    return any(name == module or name.startswith(f"{module.rstrip('/')}/") for module in modules)
