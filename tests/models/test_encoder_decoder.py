"""Packed rows and softmaxes in blocks give the losses of plain rows and whole softmaxes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_t5 import (
    CONFIG,
    PAWA,
    close,
    loss_and_gradients,
    loss_and_metrics,
    parameters,
    random_batch,
    random_groups,
)
from test_t5 import jit

from retrieval_jax.core.errors import UserError
from retrieval_jax.models.generative import GenerativeRetriever
from retrieval_jax.models.objectives import cross_entropy

SCANNED = dataclasses.replace(CONFIG, scan_layers=True, remat="full")


@pytest.mark.parametrize("config", [CONFIG, PAWA], ids=["plain", "pawa"])
def test_packed_rows_give_each_example_the_loss_it_has_alone(config):
    model, batch = GenerativeRetriever(config), random_batch()
    params = parameters(model)
    packed = {name: np.zeros((2, 2 * x.shape[1]), np.int32) for name, x in batch.items()}
    packed |= {
        name: np.zeros_like(packed[like])
        for name, like in (
            ("encoder_segment_ids", "encoder_input_tokens"),
            ("decoder_segment_ids", "decoder_input_tokens"),
            ("decoder_positions", "decoder_input_tokens"),
        )
    }
    for i in range(4):  # two a row, one directly behind the other
        row, segment = divmod(i, 2)
        for side, tokens in (("encoder", "encoder_input_tokens"), ("decoder", "decoder_target_tokens")):
            count = np.count_nonzero(batch[tokens][i])
            start = np.count_nonzero(packed[f"{side}_segment_ids"][row])
            place = slice(start, start + count)
            packed[f"{side}_segment_ids"][row, place] = segment + 1
            for name in (n for n in batch if n.startswith(side)):
                packed[name][row, place] = batch[name][i, :count]
            if side == "decoder":
                packed["decoder_positions"][row, place] = np.arange(count)
    alone, alone_metrics = loss_and_metrics(model, params, batch)
    together, metrics = loss_and_metrics(model, params, packed)
    assert together == pytest.approx(float(alone), rel=1e-5)
    for name, (total, count) in alone_metrics.items():
        assert metrics[name][1] == count
        assert metrics[name][0] == pytest.approx(float(total), rel=1e-4), name
    # The other example of a row changes nothing.
    packed["encoder_input_tokens"][packed["encoder_segment_ids"] == 2] = 7
    found, expected = (jit(model.logits)(params, b) for b in (packed, batch))
    count = np.count_nonzero(batch["decoder_target_tokens"][0])
    np.testing.assert_allclose(found[0, :count], expected[0, :count], atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, PAWA, SCANNED], ids=["plain", "pawa", "scanned"])
def test_a_group_of_targets_is_read_as_its_members_with_their_query_each(config):
    batch = {name: x for name, x in random_groups().items() if name not in ("grade", "score")}
    flat = {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items()}
    flat["encoder_input_tokens"] = np.repeat(batch["encoder_input_tokens"], 5, axis=0)
    model, blocks = GenerativeRetriever(config), GenerativeRetriever(config, max_logits_per_block=100)
    params = parameters(model)

    def weighted(model, params, batch):
        """The sum of all log-probabilities, each times a number of its own."""
        log_probs = model.predict(params, batch).log_probs_BxT
        return jnp.sum(log_probs * jnp.cos(jnp.arange(log_probs.size)).reshape(log_probs.shape))

    expected = jit(jax.value_and_grad(functools.partial(weighted, model)))(params, flat)
    for grouped in (model, blocks):
        close(jit(jax.value_and_grad(functools.partial(weighted, grouped)))(params, batch), expected)
    whole, alone = (jit(model.score_batch)(params, b) for b in (batch, flat))
    np.testing.assert_allclose(whole, alone.reshape(4, 5), rtol=1e-5)


def test_an_objective_of_one_docid_refuses_groups_of_them():
    model, batch = GenerativeRetriever(CONFIG), random_groups()
    with pytest.raises(UserError, match=r"DataConfig.negatives: .* one docid a query.*@margin_mse"):
        jax.eval_shape(model.eval_fn, parameters(model), batch)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_in_blocks_is_that_of_whole_logits(smoothing: float):
    batch, params = random_batch(), parameters(GenerativeRetriever(CONFIG))
    objective = functools.partial(cross_entropy, label_smoothing=smoothing, z_loss=1e-3)
    whole = GenerativeRetriever(CONFIG, objective=objective)
    blocks = GenerativeRetriever(CONFIG, objective=objective, max_logits_per_block=100)
    close(loss_and_gradients(blocks, params, batch), loss_and_gradients(whole, params, batch))
    close(*(loss_and_metrics(model, params, batch) for model in (blocks, whole)))
