"""Packed rows hold each example once, whole, and apart from the others."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.data.vocabulary import EOS
from retrieval_jax.examples.features import Feature
from retrieval_jax.examples.packing import Tally, pack_rows, row_lengths

FEATURES = {"inputs": Feature(24, add_eos=True), "targets": Feature(5, size=50)}


def unpacked(batch: dict[str, np.ndarray]) -> list[tuple[list[int], list[int]]]:
    """The examples' inputs and targets, read off the segments; what must hold of the rest is asserted."""
    found = []
    for row in range(len(batch["encoder_input_tokens"])):
        arrays = {name: x[row] for name, x in batch.items()}
        segments = arrays["encoder_segment_ids"]
        assert (arrays["encoder_input_tokens"][segments == 0] == 0).all()
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(arrays["decoder_segment_ids"] == segment)
            targets = arrays["decoder_target_tokens"][at].tolist()
            assert arrays["decoder_input_tokens"][at].tolist() == [0, *targets[:-1]]
            assert arrays["decoder_positions"][at].tolist() == list(range(len(at)))
            found.append((arrays["encoder_input_tokens"][segments == segment].tolist(), targets))
    np.testing.assert_array_equal(batch["decoder_loss_weights"], batch["decoder_segment_ids"] > 0)
    return sorted(found)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), min_size=1, max_size=12), st.integers(1, 4))
def test_every_example_is_there_unless_there_is_no_room(lengths, rows):
    rng = np.random.default_rng(0)
    examples = [
        {"inputs": rng.integers(2, 50, n).tolist(), "targets": rng.integers(1, 50, m).tolist()}
        for n, m in lengths
    ]
    expected = sorted(([*e["inputs"][:23], EOS], e["targets"]) for e in examples)
    tally = Tally()
    batch = pack_rows(examples, FEATURES, rows, (24, 12), tally)
    assert {x.shape for x in batch.values()} <= {(rows, 24), (rows, 12)}
    found = unpacked(batch)
    roomy = pack_rows(examples, FEATURES, len(examples), (24, 5))  # a row for each
    assert unpacked(roomy) == expected
    # Cut or left out only where rows are too few, and then counted.
    assert tally.examples == len(examples)
    assert tally.left_out == len(examples) - len(found)
    whole = list(expected)
    for example in found:
        if example in whole:
            whole.remove(example)
    assert tally.cut == len(whole) - tally.left_out
    for inputs, targets in found:
        assert any(t == targets and i[: len(inputs) - 1] == inputs[:-1] for i, t in expected)
    if sum(len(i) for i, _ in found) < sum(len(i) for i, _ in expected):
        room = 24 - (batch["encoder_segment_ids"] > 0).sum(1)
        full = (batch["decoder_segment_ids"] > 0).sum(1) > 12 - 5
        longest = max(len(i) for i, _ in expected)
        assert ((room < longest) | full).all()
    again = pack_rows(examples, FEATURES, rows, (24, 12))
    assert all((again[name] == x).all() for name, x in batch.items())


def test_what_packing_leaves_out_is_told(capsys):
    tally = Tally()
    for _ in range(9):
        tally.add(64, 1, 2)
    assert not capsys.readouterr().err
    tally.add(64, 1, 2)
    assert "left out 10 and cut 20 of 640 examples" in " ".join(capsys.readouterr().err.split())
    nothing = Tally()
    for _ in range(100):
        nothing.add(64, 0, 0)
    assert not capsys.readouterr().err


def test_row_lengths_hold_the_mean_and_any_single_example():
    assert row_lengths(FEATURES, 4, 3.0) == (24, 16)
    assert row_lengths(FEATURES, 1, 1.0) == (24, 8)
    assert row_lengths({**FEATURES, "targets": Feature(40)}, 2, 3.0) == (24, 40)
