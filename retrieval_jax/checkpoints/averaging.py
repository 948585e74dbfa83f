"""The average of two models' weights, with which a third one begins."""

import dataclasses

from retrieval_jax.checkpoints.parameter_names import grouped, shortened
from retrieval_jax.checkpoints.pretrained import Pretrained
from retrieval_jax.checkpoints.weights import mean
from retrieval_jax.core.errors import UserError
from retrieval_jax.models.layers import T5Config

AVERAGED_WITH = "InitialCheckpoint.averaged_with"
UNSEEN = ("mlp_activations", "relpos_max_distance")  # which no array's shape tells
DEPTHS = ("num_encoder_layers", "num_decoder_layers", "pawa_layers")  # 0: the network has no such part
OUTPUTS = ("output_size", "separate_target_embedding")  # of a network that writes docids


def averaged(pretrained: Pretrained, others: Pretrained) -> Pretrained:
    """Averages weights with others of a network of the same sizes; arrays that one lacks stay as they are.

    Args:
      pretrained: the weights, whose facts the result has.
      others: those to average them with.

    Raises:
      UserError: the networks differ in a size that both use, or in an array's shape.
    """
    arrays, theirs = pretrained.arrays, others.arrays
    shared = arrays.keys() & theirs.keys()
    both = (T5Config(**pretrained.network), T5Config(**others.network))
    sizes = [(name, *(getattr(network, name) for network in both)) for name in (*DEPTHS, *UNSEEN)]
    differ = [name for name, one, other in sizes if one and other and one != other]
    differ += sorted(name for name in shared if arrays[name].shape != theirs[name].shape)
    if differ or not shared:
        what = f"differs from it in {shortened(grouped(differ))}" if differ else "shares no array with it"
        raise UserError(
            f"{AVERAGED_WITH}: {pretrained.path}, and {others.path} {what}: average networks of one size"
        )
    merged = {**theirs, **arrays} | {name: mean([arrays[name], theirs[name]]) for name in shared}
    outputs = {name: vars(both[0])[name] or vars(both[1])[name] for name in OUTPUTS}
    return dataclasses.replace(pretrained, arrays=merged, network={**pretrained.network, **outputs})
