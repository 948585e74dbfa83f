"""T5X's own trainer over its own T5 1.1, where T5X can be imported (see train_step.py)."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from retrieval_jax.models.layers import T5Config


def importable() -> bool:
    """Whether T5X is on the path; makes it importable beside today's libraries."""
    if importlib.util.find_spec("t5x") is None:
        return False
    from retrieval_jax.interop.t5x import bridge

    bridge()
    return True


def train(
    config: T5Config,
    batches: Iterator[dict],
    steps: int,
    rate: float,
    scratch: Path,
    done: Callable[[], None],
) -> None:
    """T5X's Trainer for so many steps, with its Adafactor; `done` is called when the last is computed."""
    import seqio
    from t5x import adafactor, models, partitioning, trainer, utils
    from t5x.examples.t5 import network

    sizes = ("vocab_size", "emb_dim", "num_heads", "num_encoder_layers", "num_decoder_layers", "head_dim")
    module = network.Transformer(
        network.T5Config(
            **{name: getattr(config, name) for name in sizes},
            mlp_dim=config.mlp_dim,
            mlp_activations=("gelu", "linear"),
            dropout_rate=config.dropout_rate,
            dtype=config.dtype,
            logits_via_embedding=False,
        )
    )
    vocabulary = seqio.PassThroughVocabulary(config.vocab_size)
    optimizer = adafactor.Adafactor(decay_rate=0.8, step_offset=0)
    model = models.EncoderDecoderModel(module, vocabulary, vocabulary, optimizer, z_loss=0.0)
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    first = next(batches)
    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={name: array.shape for name, array in first.items()},
        input_types={name: array.dtype for name, array in first.items()},
        partitioner=partitioner,
    )
    runner = trainer.Trainer(
        model=model,
        train_state=initializer.from_scratch(jax.random.PRNGKey(0)),
        partitioner=partitioner,
        eval_names=[],
        summary_dir=str(scratch),
        train_state_axes=initializer.train_state_axes,
        rng=jax.random.PRNGKey(0),
        learning_rate_fn=lambda step: rate,
        num_microbatches=None,
    )
    runner.train(batches, steps)
    jax.block_until_ready(runner.train_state.params)  # it asks for batches far ahead of its steps
    done()
    runner.close()
