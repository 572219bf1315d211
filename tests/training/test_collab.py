"""Models of who likes what: the product of factors, its range, a network instead, and training on choices alone."""

import pytest
import torch

from blocks import DataLoaders
from training import BCEWithLogitsLossFlat, Learner
from training.collab import AgainstOthers, EmbeddingDotBias, EmbeddingNN
from training.models import ModelSpec

CODES = torch.tensor([[1, 2], [2, 1], [0, 0]])


def test_a_score_is_the_product_of_factors_and_both_biases() -> None:
    model = EmbeddingDotBias(3, 4, 5)
    with torch.no_grad():
        wanted = [
            (model.u_weight.weight[u] @ model.i_weight.weight[i] + model.u_bias.weight[u] + model.i_bias.weight[i]).item()
            for u, i in CODES.tolist()
        ]
        assert model(CODES).tolist() == pytest.approx(wanted)
    squeezed = EmbeddingDotBias(3, 4, 5, (1.0, 3.0))(CODES)
    assert ((squeezed > 1) & (squeezed < 3)).all()


def test_a_network_of_embeddings() -> None:
    assert EmbeddingNN([(4, 3), (5, 2)], layers=(8,), y_range=(0.0, 1.0))(CODES).shape == (3,)


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec("embedding_dot_bias", {"n_factors": 3, "n_users": 4, "n_items": 5, "y_range": [0.0, 5.0]}),
        ModelSpec("embedding_nn", {"emb_szs": [[4, 3], [5, 2]], "layers": [8]}),
    ],
)
def test_it_is_built_again_from_plain_data(spec: ModelSpec) -> None:
    assert spec.build().spec == spec


def test_choices_alone_teach_what_is_liked() -> None:
    """Odd users choose odd items, even ones even items."""
    torch.manual_seed(0)
    pairs = torch.tensor([(u, i) for u in range(1, 21) for i in range(1, 21) if (u + i) % 2 == 0 and (u * i) % 3])
    order = torch.randperm(len(pairs))
    batches = [(pairs[some],) for some in order.split(16)]
    model = EmbeddingDotBias(4, 21, 21)
    learn = Learner(
        DataLoaders(batches[1:], batches[:1]), model, BCEWithLogitsLossFlat(), callbacks=[AgainstOthers(21)], lr=0.03
    )
    with learn.no_logging():
        learn.fit(15)
    scores = model(torch.cartesian_prod(torch.arange(1, 21), torch.arange(1, 21))).view(20, 20)
    alike = (torch.arange(20)[:, None] + torch.arange(20)) % 2 == 0
    assert scores[alike].mean() > scores[~alike].mean() + 2


def test_predictions_of_choices_are_their_own_scores() -> None:
    data = DataLoaders([(CODES,)], [(CODES,)])
    learn = Learner(data, EmbeddingDotBias(2, 3, 3), BCEWithLogitsLossFlat(), callbacks=[AgainstOthers(3)])
    preds, _ = learn.get_preds()
    torch.testing.assert_close(preds, learn.model(CODES).sigmoid().detach())


def test_others_are_drawn_by_the_keys_of_the_rows_and_are_never_unknown() -> None:
    callback, seen = AgainstOthers(3), []

    class Watch(type(callback).__mro__[1]):  # type: ignore[misc]
        order = 6

        def before_batch(self, learn: Learner) -> None:
            seen.append(learn.xb[0].clone())

    data = DataLoaders([(CODES,)], [(CODES,)])
    learn = Learner(data, EmbeddingDotBias(2, 3, 3), BCEWithLogitsLossFlat(), callbacks=[callback, Watch()])
    learn.validate()
    learn.validate()
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0][:3], CODES)
    assert torch.equal(seen[0][3:, 0], CODES[:, 0])
    assert (seen[0][3:, 1] > 0).all()
    with pytest.raises(ValueError, match="at least 3"):
        AgainstOthers(2)
