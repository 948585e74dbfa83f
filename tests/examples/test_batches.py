"""The stream of batches: order, shares, resuming at a position, hosts; and seqio's own converters."""

import itertools
import types
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import seqio
import tensorflow as tf

from retrieval_jax.core import arrow_ids
from retrieval_jax.core.errors import UserError
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.batches import batches, drop, examples_of
from retrieval_jax.examples.examples import Examples
from retrieval_jax.examples.features import Feature, pad
from retrieval_jax.examples.mixtures import mix_tasks
from retrieval_jax.examples.targets import DocidTargets, PassageTargets
from retrieval_jax.examples.tasks import Example, Task
from retrieval_jax.models.feature_converters import DualEncoderFeatureConverter


class Numbers(Task):
    """Example i reads i and answers with docid i."""

    def __init__(self, first: int, count: int):
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def get(self, numbers: Sequence[int], rngs: Iterable[np.random.Generator]) -> list[Example]:
        return [Example([self.first + i], [self.first + i], [1]) for i in numbers]


IDS = arrow_ids.array([str(i) for i in range(300)])
TABLE = DocidTable("atomic", np.arange(1, 301, dtype=np.int32)[:, None], IDS, 384, "x")
TARGETS = DocidTargets(TABLE, 2)


def stream(shares: dict, seed: int = 0, position: int = 0, count: int = 10, **rest) -> np.ndarray:
    """The examples' numbers, batches × rows."""
    sources = {
        "few": Examples(Numbers(0, 40), TARGETS),
        "many": Examples(Numbers(100, 200), TARGETS),
    }
    stages = rest.pop("stages", [(None, shares)])
    stages = [(n, {name: (sources[name], share) for name, share in mixed.items()}) for n, mixed in stages]
    some = batches(stages, TARGETS, {}, 20, seed, 20 * position, **rest)
    return np.stack([b["decoder_target_tokens"][:, 0] - 1 for b in itertools.islice(some, count)])


def test_an_epoch_holds_every_example_once_and_each_epoch_has_its_own_order():
    two = stream({"few": 1.0}, count=4).reshape(2, 40)
    assert [sorted(epoch) for epoch in two.tolist()] == [list(range(40))] * 2
    assert (two[0] != two[1]).any()
    assert two[0].tolist() != list(range(40))


def test_shares_are_kept():
    counts = Counter((stream({"few": 0.25, "many": 0.75}, count=40) >= 100).ravel().tolist())
    assert counts[True] == pytest.approx(600, abs=2)


@pytest.mark.parametrize("position", [1, 7, 29])
def test_batches_depend_on_seed_and_position_alone(position: int):
    shares = {"few": 0.5, "many": 0.5}
    whole = stream(shares, count=30)
    np.testing.assert_array_equal(stream(shares, position=position, count=30 - position), whole[position:])
    assert (stream(shares, seed=1, count=30) != whole).any()
    assert stream(shares, position=10**9, count=1).shape == (1, 20)  # seeks, does not skip


def test_packed_batches_hold_the_examples_of_those_that_are_not():
    targets = DocidTargets(TABLE, 8)  # four examples of two tokens a row
    examples = {"many": (Examples(Numbers(100, 200), targets), 1.0)}
    alone = next(batches([(None, examples)], targets, {}, 20, 0, 3))
    packed = next(batches([(None, examples)], targets, {}, 20, 0, 3, pack=4))
    assert packed["encoder_input_tokens"].shape == (5, 8)
    assert packed["encoder_segment_ids"].tolist() == [[1, 1, 2, 2, 3, 3, 4, 4]] * 5
    written = packed["decoder_target_tokens"][packed["decoder_loss_weights"] > 0]
    assert sorted(written) == sorted(alone["decoder_target_tokens"].ravel())
    with pytest.raises(UserError, match=r"DataConfig.pack: 3 does not divide the batch of 20"):
        next(batches([(None, examples)], targets, {}, 20, 0, pack=3))


@pytest.mark.parametrize("rows", [range(10), [0, 1, 2, 3, 12, 13, 14, 15], [19]])
def test_a_host_reads_its_rows_of_each_batch(rows):
    stages = [(6, {"few": 0.5, "many": 0.5}), (None, {"many": 1.0})]
    whole = stream({}, stages=stages, position=3, count=5)
    np.testing.assert_array_equal(stream({}, stages=stages, rows=rows, position=3, count=5), whole[:, rows])


class Drawn(Numbers):
    """Which docid answers is drawn."""

    def get(self, numbers: Sequence[int], rngs: Iterable[np.random.Generator]) -> list[Example]:
        return [
            Example([self.first + i], [int(rng.integers(300))], [1])
            for i, rng in zip(numbers, rngs, strict=True)
        ]


@pytest.mark.parametrize("position", [0, 3, 5])
def test_the_examples_of_a_batch_are_told_with_what_they_drew(position: int):
    tasks = {"few": Drawn(0, 40), "many": Drawn(100, 200)}
    sources = {name: Examples(task, TARGETS) for name, task in tasks.items()}
    stages = [
        (4, {"few": (sources["few"], 0.5), "many": (sources["many"], 0.5)}),
        (None, {"many": (sources["many"], 1.0)}),
    ]
    batch = next(batches(stages, TARGETS, {"few": 0.5}, 20, 7, 20 * position))
    told = examples_of(stages, 20, 7, 20 * position, lambda task, i, rng: (task, tasks[task](i, rng)))
    assert [e.rows[0] for _, e in told] == (batch["decoder_target_tokens"][:, 0] - 1).tolist()
    assert [e.tokens[0] for _, e in told] == batch["encoder_input_tokens"][:, 0].tolist()
    assert {task for task, _ in told} == ({"few", "many"} if position < 4 else {"many"})


def test_a_curriculum_goes_through_its_stages_wherever_it_is_resumed():
    stages = [(3, {"few": 1.0}), (2, {"many": 1.0}), (None, {"few": 1.0})]
    whole = stream({}, stages=stages, count=8)
    assert [(b >= 100).all() for b in whole] == [False] * 3 + [True] * 2 + [False] * 3
    for position in range(8):
        resumed = stream({}, stages=stages, position=position, count=8 - position)
        np.testing.assert_array_equal(resumed, whole[position:])


def test_a_query_differs_from_its_copy_by_a_typo_alone():
    """Tokens are left out of both, or of neither."""
    spec = {"inputs": Feature(20), "copy": Feature(20)}
    targets = types.SimpleNamespace(features=spec, to_batch=lambda arrays: arrays, prompt=())

    class Queries:
        """Every second one has a typo."""

        def __len__(self) -> int:
            return 40

        def __call__(self, i: int, rng: np.random.Generator) -> dict[str, list[int]]:
            words = list(range(i + 1, i + 21))
            return {"inputs": [99, *words[1:]] if i % 2 else words, "copy": words}

    batch = next(batches([(None, {"x": (Queries(), 1.0)})], targets, {"x": 0.5}, 40, 0))
    has_typo_B = (batch["inputs"] == 99).any(axis=1)
    assert has_typo_B.sum() == 20
    assert (batch["inputs"][has_typo_B, 1:] == batch["copy"][has_typo_B, 1:]).all()
    assert (batch["inputs"][has_typo_B] > 0).all()
    np.testing.assert_array_equal(batch["inputs"][~has_typo_B], batch["copy"][~has_typo_B])
    assert 5 < (batch["inputs"][~has_typo_B] > 0).sum(axis=1).mean() < 15


def test_dropped_tokens_leave_a_subsequence():
    rng = np.random.default_rng(0)
    tokens = list(range(1, 1001))
    kept = drop(tokens, 0.3, rng)
    assert kept == sorted(kept)
    assert set(kept) <= set(tokens)
    assert 650 < len(kept) < 750
    assert drop([5], 0.999, rng) == [5]  # never nothing


def test_a_prompt_stays_when_tokens_are_dropped():
    """All of it, but for a last piece that goes on with the text; and some of the text."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert drop([7, 8, 9, *range(20, 30)], 0.5, rng, [7, 8, 9])[:3] == [7, 8, 9]
        assert drop([7, 8, 99, *range(20, 30)], 0.5, rng, [7, 8, 9])[:2] == [7, 8]
        assert drop([7, 8, 9, 5], 0.999, rng, [7, 8, 9]) == [7, 8, 9, 5]
    dropped = [tuple(drop([7, 8, 9, 5, 6], 0.5, rng, [7, 8, 9])[3:]) for _ in range(100)]
    assert {*dropped} == {(5, 6), (5,), (6,)}


def test_batches_are_those_of_seqios_converters():
    rng = np.random.default_rng(0)
    spec = {"inputs": 7, "targets": 4}
    ragged = [
        {name: rng.integers(2, 99, rng.integers(1, n + 1)).tolist() for name, n in spec.items()}
        for _ in range(9)
    ]
    expected = converted(seqio.EncDecFeatureConverter(pack=False), ragged, spec)
    features = pad(ragged, {name: Feature(n) for name, n in spec.items()})
    same(DocidTargets.to_batch(features), expected)

    spec = {"inputs": 7, "targets": 12, "passage": 3, "grade": 3, "other_positives": 2}
    whole = [
        {
            name: rng.integers(1, 99, rng.integers(1, n + 1) if name == "inputs" else n).tolist()
            for name, n in spec.items()
        }
        for _ in range(9)
    ]
    expected = converted(DualEncoderFeatureConverter(pack=False), whole, spec)
    same(PassageTargets.to_batch(pad(whole, {name: Feature(n) for name, n in spec.items()})), expected)


def converted(converter: seqio.FeatureConverter, examples: list[dict], lengths: dict) -> dict:
    signature = {name: tf.TensorSpec([None], tf.int32) for name in lengths}
    dataset = tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=signature)
    return next(converter(dataset, lengths).batch(len(examples)).as_numpy_iterator())


def same(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("size", [5, 16, 40])
def test_a_stream_goes_on_with_another_batch_size_without_a_gap_or_a_repeat(size: int):
    """Also over the end of a curriculum's stage, which a batch may overlap; and stopped and begun again."""
    sources = {name: Examples(Numbers(0, 200), TARGETS) for name in ("a", "b")}
    epoch = [(None, {"a": (sources["a"], 1.0)})]

    def read(stages: list, size: int, position: int, count: int) -> list[int]:
        some = batches(stages, TARGETS, {}, size, 0, position)
        return [n for b in itertools.islice(some, count) for n in b["decoder_target_tokens"][:, 0].tolist()]

    whole = read(epoch, 20, 0, 10)
    first, rest = read(epoch, 20, 0, 2), read(epoch, size, 40, 160 // size)
    assert first + rest == whole
    assert len({*first, *rest}) == 200

    staged = [(3, {"a": (sources["a"], 1.0)}), (None, {"b": (sources["b"], 1.0)})]
    parts = [read(staged, size, 20 + size * n, 1) for n in range(12)]
    assert [*itertools.chain.from_iterable(parts)] == read(staged, size, 20, 12)


def test_a_task_without_examples_is_told_of(capsys):
    sizes = {"firstp": range(6), "labelled": range(0), "daq": range(2)}
    mixed = mix_tasks({"firstp": 0.5, "labelled": 0.3, "daq": 0.5}, sizes.__getitem__)
    assert {name: share for name, (_, share) in mixed.items()} == {"firstp": 0.5, "daq": 0.5}
    assert "labelled: no examples, so left out of the mixture" in capsys.readouterr().err
