"""The same network in Hugging Face's transformers, which `generate`s docids from a trie of Python dicts."""

from collections.abc import Callable

import numpy as np
import torch
import transformers

from retrieval_jax.data.vocabulary import EOS, PAD
from retrieval_jax.models.layers import T5Config


def random_network(c: T5Config) -> transformers.T5ForConditionalGeneration:
    """A T5 1.1 of these sizes; its decoder reads and writes a vocabulary of `c.output_size`."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=c.vocab_size,
        d_model=c.emb_dim,
        d_kv=c.head_dim,
        d_ff=c.mlp_dim,
        num_heads=c.num_heads,
        num_layers=c.num_encoder_layers,
        num_decoder_layers=c.num_decoder_layers,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    network = transformers.T5ForConditionalGeneration(config)
    # transformers 5 ties these in spite of tie_word_embeddings=False.
    network.decoder.embed_tokens = torch.nn.Embedding(c.output_size, c.emb_dim)
    network.lm_head = torch.nn.Linear(c.emb_dim, c.output_size, bias=False)
    torch.nn.init.normal_(network.lm_head.weight, std=3 * c.emb_dim**-0.5)
    return network.eval()


def params_of(network: transformers.T5ForConditionalGeneration) -> dict:
    """The network's weights as this project's parameters."""

    def kernels(module, **names: str) -> dict:
        return {
            ours: {"kernel": getattr(module, theirs).weight.detach().numpy().T}
            for ours, theirs in names.items()
        }

    def attention(module) -> dict:
        return kernels(module, query="q", key="k", value="v", out="o")

    def mlp(sublayer) -> dict:
        return kernels(sublayer.DenseReluDense, wi_0="wi_0", wi_1="wi_1", wo="wo")

    def scale(module) -> dict:
        return {"scale": module.weight.detach().numpy()}

    def embedding(module) -> dict:
        return {"embedding": module.weight.detach().numpy()}

    def stack(name: str, layer: Callable[..., dict]) -> dict:
        theirs = getattr(network, name)
        bias = theirs.block[0].layer[0].SelfAttention.relative_attention_bias
        return {
            **{f"layers_{i}": layer(*block.layer) for i, block in enumerate(theirs.block)},
            "relpos_bias": {"rel_embedding": bias.weight.detach().numpy().T},
            f"{name}_norm": scale(theirs.final_layer_norm),
        }

    def encoder_layer(attends, last) -> dict:
        return {
            "pre_attention_layer_norm": scale(attends.layer_norm),
            "attention": attention(attends.SelfAttention),
            "pre_mlp_layer_norm": scale(last.layer_norm),
            "mlp": mlp(last),
        }

    def decoder_layer(attends, crosses, last) -> dict:
        return {
            "pre_self_attention_layer_norm": scale(attends.layer_norm),
            "self_attention": attention(attends.SelfAttention),
            "pre_cross_attention_layer_norm": scale(crosses.layer_norm),
            "encoder_decoder_attention": attention(crosses.EncDecAttention),
            "pre_mlp_layer_norm": scale(last.layer_norm),
            "mlp": mlp(last),
        }

    return {
        "token_embedder": embedding(network.shared),
        "decoder_token_embedder": embedding(network.decoder.embed_tokens),
        "encoder": stack("encoder", encoder_layer),
        "decoder": stack("decoder", decoder_layer) | kernels(network, logits_dense="lm_head"),
    }


class EndedBeamsStay(transformers.LogitsProcessor):
    """A docid that has ended goes on with padding, at no cost, and so keeps its place among the beams.

    `generate` puts ended hypotheses aside where it is told the end's token, and searches on with a full set
    of others: as it looks at more, its answers are at least as probable, and not those of such a search.
    """

    def __call__(self, written: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        ended = (written[:, 1:] == EOS).any(1)
        log_probs[ended, PAD] = 0.0
        return log_probs


def multiply(products: list[tuple[np.ndarray, np.ndarray]]) -> Callable[[int], None]:
    """(threads) -> nothing: PyTorch's matrix products of those pairs."""
    pairs = [[torch.from_numpy(np.array(x)) for x in pair] for pair in products]
    made = [torch.empty(len(a), b.shape[1]) for a, b in pairs]

    def run(threads: int) -> None:
        torch.set_num_threads(threads)
        for (a, b), out in zip(pairs, made, strict=True):
            torch.mm(a, b, out=out)

    return run


def searcher(
    network: transformers.T5ForConditionalGeneration, trie: dict, length: int, beams: int, put_aside: bool
) -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """(queries B×S, threads) -> (docids' tokens B×beams×length, their scores B×beams), best first.

    `put_aside`: as `generate` does it by itself, see EndedBeamsStay.
    """

    def allowed(_, written: torch.Tensor) -> list[int]:
        node = trie
        for token in written.tolist()[1:]:
            node = node.get(token, {})
        return list(node) or [PAD]

    config = transformers.GenerationConfig(
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        max_new_tokens=length,
        pad_token_id=PAD,
        eos_token_id=EOS if put_aside else None,
        decoder_start_token_id=0,
        # Scores are sums of log-probabilities, of the full softmax: the trie masks them after it. And the
        # search ends when no beam can become better than those found, not when there are enough.
        length_penalty=0.0,
        early_stopping="never",
        return_dict_in_generate=True,
        output_scores=True,
    )
    processors = transformers.LogitsProcessorList([] if put_aside else [EndedBeamsStay()])

    def search(queries_BxS: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
        torch.set_num_threads(threads)
        network.generation_config = config  # as an argument its None would be filled from the network's own
        with torch.inference_mode():
            found = network.generate(
                torch.from_numpy(queries_BxS).long(),
                prefix_allowed_tokens_fn=allowed,
                logits_processor=processors,
            )
        written = found.sequences[:, 1:].numpy()
        tokens = np.zeros((len(written), length), written.dtype)
        tokens[:, : written.shape[1]] = written
        tokens[(tokens == EOS).cumsum(1) - (tokens == EOS) > 0] = PAD  # it pads with either
        shape = len(queries_BxS), beams
        return tokens.reshape(*shape, length), found.sequences_scores.numpy().reshape(shape)

    return search
