"""Short vectors (Matryoshka) of a dual encoder: the loss at each size by hand, and as others have it."""

import numpy as np
import pytest
from test_dual_encoder import info_nce_by_hand, network, parameters, random_batch, vectors_by_hand

from retrieval_jax.models.distillation import dense_margin_mse


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_matryoshka_is_the_loss_at_each_size(dtype: str):
    """Of objective and distillation, both by hand from the vectors, float32 whatever the network's dtype."""
    settings = {"matryoshka": (2, 4), "matryoshka_weights": (0.5, 2.0), "distillation": dense_margin_mse}
    model = network(**settings, distillation_weight=3.0, dtype=dtype)
    params, batch = parameters(model), random_batch()
    rows = (batch["grade"] > 0).any(1) & (batch["passage"] >= 0).any(1)

    def by_hand(size: int | None) -> float:
        queries, passages = vectors_by_hand(model, params, batch, size)
        total = info_nce_by_hand(model, params, batch, size=size) * rows.sum()
        for query, group, grades, teacher in zip(
            queries, passages, batch["grade"], batch["score"], strict=True
        ):
            s, known = model.scale * group @ query, ~np.isnan(teacher) & (grades >= 0)
            pairs = [(i, j) for i in range(4) for j in range(4) if known[i] and known[j]]
            errors = [
                ((s[i] - s[j]) - (teacher[i] - teacher[j])) ** 2
                for i, j in pairs
                if grades[i] > 0 and grades[j] == 0
            ]
            total += 3 * np.mean(errors) if errors else 0
        return total / rows.sum()

    loss, metrics = model.eval_fn(params, batch)
    expected = by_hand(None) + 0.5 * by_hand(2) + 2 * by_hand(4)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(loss) == pytest.approx(float(metrics["loss"][0] / metrics["loss"][1]), rel=1e-6)
    at_2 = metrics["loss_first/2"]
    assert float(at_2[0] / at_2[1]) == pytest.approx(by_hand(2), rel=1e-4)
    assert {"accuracy_first/4", "distillation_first/4", "accuracy", "distillation"} < metrics.keys()


def test_a_matryoshka_is_that_of_sentence_transformers():
    """MultipleNegativesRankingLoss and MarginMSELoss, of the same vectors of unit length."""
    torch = pytest.importorskip("torch")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

    class Given(torch.nn.Module):
        """Stands for a SentenceTransformer: its texts are their vectors."""

        def forward(self, features: dict) -> dict:
            return {"sentence_embedding": features["vectors"]}

        def get_embedding_dimension(self) -> int:
            return 6

    batch = random_batch(B=4, G=2, distinct=50)
    batch |= {"passage": np.arange(8, dtype=np.int32).reshape(4, 2), "grade": np.int32([[1, 0]] * 4)}
    del batch["other_positives"]
    batch["score"] = np.random.default_rng(1).normal(size=(4, 2)).astype(np.float32)
    sizes = {"matryoshka": (2, 4), "matryoshka_weights": (0.5, 2.0), "bidirectional": False}
    params = parameters(network())
    queries, passages = vectors_by_hand(network(), params, batch)
    columns = [{"vectors": torch.tensor(x)} for x in (queries, passages[:, 0], passages[:, 1])]

    def theirs(loss, labels) -> float:
        matryoshka = losses.MatryoshkaLoss(given, loss, [6, 4, 2], [1.0, 2.0, 0.5])
        return float(matryoshka(columns, labels))

    given = Given()
    ranking = losses.MultipleNegativesRankingLoss(given, scale=5.0)
    ours = float(network(**sizes).eval_fn(params, batch)[0])
    assert ours == pytest.approx(theirs(ranking, None), rel=1e-5)
    margins = torch.tensor(batch["score"][:, 0] - batch["score"][:, 1])
    alone = network(**sizes, scale=1.0, objective_weight=0.0, distillation=dense_margin_mse)
    expected = theirs(losses.MarginMSELoss(given), margins)
    assert float(alone.eval_fn(params, batch)[0]) == pytest.approx(expected, rel=1e-5)
