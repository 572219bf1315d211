"""Language models and classifiers of tokens: the five dropouts, state between batches, padding, long texts."""

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from blocks import DataLoaders
from blocks.tensors import TensorText
from training import SGD, Callback, CrossEntropyLossFlat, Learner, ModelResetter, Perplexity, RNNRegularizer
from training.awd_lstm import (
    AWD_LSTM,
    EmbeddingDropout,
    WeightDropout,
    awd_lstm_clas_split,
    awd_lstm_classifier,
    awd_lstm_lm,
    awd_lstm_lm_split,
)
from training.testing import check_goes_on_where_it_stopped
from training.text import PAD, RNNDropout, concat_pool, token_accuracy

from .several_ranks import on_ranks

SMALL: dict[str, Any] = {"n_vocab": 20, "emb_sz": 6, "n_hid": 8, "n_layers": 2}


def lm(**settings: Any) -> Any:
    torch.manual_seed(0)
    return awd_lstm_lm(**SMALL | {"drop_mult": 0.0} | settings)


def classifier(**settings: Any) -> Any:
    torch.manual_seed(0)
    return awd_lstm_classifier(**SMALL | {"n_out": 3} | settings)


def tokens(rows: int, steps: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 20, (rows, steps), generator=torch.Generator().manual_seed(seed))


def padded(texts: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PAD)


def test_pads_are_those_of_the_data() -> None:
    assert TensorText.pad_value == PAD == awd_lstm_lm(**SMALL).encoder.pad_id


def test_a_language_model_without_dropout_is_torchs_lstm() -> None:
    model, x = lm(), tokens(3, 5)
    logits, raw, dropped = model(x)
    out = model.encoder.embedding.weight[x]
    for layer in model.encoder.layers:
        plain = torch.nn.LSTM(layer.input_size, layer.hidden_size, batch_first=True)
        plain.load_state_dict(layer.state_dict())
        out, _ = plain(out)
    torch.testing.assert_close(raw, out)
    torch.testing.assert_close(logits, out @ model.encoder.embedding.weight.T + model.decoder.bias)
    assert torch.equal(raw, dropped)


def test_the_state_lives_on_until_reset() -> None:
    model, x = lm().eval(), tokens(3, 10)
    whole = model(x)[0]
    model.reset()
    pieces = torch.cat([model(piece)[0] for piece in x.split(4, dim=1)], dim=1)
    torch.testing.assert_close(pieces, whole)
    assert not any(part.requires_grad for state in model.hidden for part in state)
    assert not torch.allclose(model(x)[0], whole)
    model.reset()
    torch.testing.assert_close(model(x)[0], whole)
    model(tokens(2, 4))  # other streams, other rows
    assert model.hidden[0][0].shape[1] == 2


def test_the_decoder_is_tied_to_the_embedding_and_stays_so_in_copies() -> None:
    for model in (lm(), copy.deepcopy(lm())):
        assert model.decoder.weight is model.encoder.embedding.weight
    assert lm(tie_weights=False).decoder.weight is not lm().encoder.embedding.weight


@pytest.mark.parametrize("which", ["embed_p", "input_p", "weight_p", "hidden_p", "output_p"])
def test_each_dropout_changes_training_only(which: str) -> None:
    off = dict.fromkeys(["embed_p", "input_p", "weight_p", "hidden_p", "output_p"], 0.0)
    model, x = lm(**off | {which: 0.5}, drop_mult=1.0), tokens(3, 6)
    calm = lm(**off)(x)[0]
    first = model(x)[0]
    model.reset()
    assert not torch.allclose(first, model(x)[0])
    model.eval().reset()
    torch.testing.assert_close(model(x)[0], calm)


def test_dropout_of_words_drops_all_their_places_and_keeps_the_mean() -> None:
    embedding, x = EmbeddingDropout(2000, 4, 0.3), torch.arange(2000).repeat(2, 1)
    out, plain = embedding(x), embedding.weight[x]
    kept = out[0].abs().sum(1) > 0
    torch.testing.assert_close(out[:, kept], plain[:, kept] / 0.7)
    assert torch.equal(out[0], out[1])
    assert kept[2:].float().mean() == pytest.approx(0.7, abs=0.05)


def test_dropout_of_features_is_the_same_at_all_steps() -> None:
    out = RNNDropout(0.4)(torch.ones(50, 7, 20))
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.6])


def test_dropped_recurrent_weights_keep_the_kernel_and_the_gradient() -> None:
    layer, x = WeightDropout(4, 5, 0.5), torch.randn(3, 6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(2)
        out, _ = layer(x)
        out.sum().backward()
    torch.manual_seed(2)
    dropped = torch.nn.functional.dropout(layer.weight_hh_l0.detach(), 0.5)
    plain = torch.nn.LSTM(4, 5, batch_first=True)
    plain.load_state_dict(layer.state_dict() | {"weight_hh_l0": dropped})
    torch.testing.assert_close(out, plain(x)[0])
    assert bool((layer.weight_hh_l0.grad[dropped == 0] == 0).all())
    assert bool((layer.weight_hh_l0.grad[dropped != 0] != 0).any())


@pytest.mark.parametrize("max_len", [100, 12])
def test_a_text_alone_gives_what_it_gives_in_a_batch(max_len: int) -> None:
    model = classifier(seq_len=5, max_len=max_len).eval()
    texts = [tokens(1, n, seed=n)[0] for n in (33, 3, 17, 12, 1)]
    together = model(padded(texts))[0]
    for text, row in zip(texts, together, strict=True):
        torch.testing.assert_close(model(text[None])[0][0], row)
    further = torch.nn.functional.pad(padded(texts), (0, 9), value=PAD)
    torch.testing.assert_close(model(further)[0], together)


def test_pieces_change_no_number_and_only_the_last_tokens_are_pooled() -> None:
    text = tokens(1, 23)
    whole = classifier(seq_len=72).eval()
    torch.testing.assert_close(whole(text)[0], classifier(seq_len=5).eval()(text)[0])
    model = classifier(seq_len=5, max_len=7).eval()
    _, outputs, _, mask = model(text)
    assert mask.sum() == 7
    assert outputs.shape[1] == 8  # the pieces from 15 on
    assert torch.equal(mask[0], torch.arange(8) > 0)
    torch.testing.assert_close(outputs, whole(text)[1][:, 15:])


def test_what_comes_before_the_window_gets_no_gradient() -> None:
    model = classifier(seq_len=5, max_len=7)
    model.train()
    text = torch.cat([torch.full((2, 10), 2), torch.full((2, 13), 3)], dim=1)
    model(text)[0].sum().backward()
    gradient = model.encoder.embedding.weight.grad.abs().sum(1)
    assert gradient[2] == 0 < gradient[3]


def test_pooling() -> None:
    outputs = torch.tensor([[[1.0], [5.0], [3.0], [9.0]], [[1.0], [2.0], [4.0], [4.0]], [[7.0], [8.0], [8.0], [8.0]]])
    mask = torch.tensor([[True, True, True, False], [False, True, True, True], [False] * 4])
    assert concat_pool(outputs, mask).tolist() == [[3, 5, 3], [4, 4, pytest.approx(10 / 3)], [7, 7, 7]]


def test_groups_for_freezing() -> None:
    model = lm()
    groups = awd_lstm_lm_split(model)
    assert [len(group) for group in groups] == [4, 4, 2]
    assert groups[-1][0] is model.decoder.weight
    groups = awd_lstm_clas_split(classifier())
    assert [len(group) for group in groups[:3]] == [1, 4, 4]
    assert sum(map(len, groups)) == len(list(classifier().parameters()))


def test_penalties_do_not_depend_on_the_padding() -> None:
    class Of:  # a Learner's batch
        training = True

        def __init__(self, pred: Any):
            self.pred, self.loss_grad = pred, torch.zeros(())

    found = []
    outputs = torch.randn(2, 4, 3)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    for extra in (0, 3):
        padded_outputs = torch.cat([outputs, torch.randn(2, extra, 3)], dim=1)
        padded_mask = torch.nn.functional.pad(mask, (0, extra))
        of, penalties = Of((torch.zeros(2), padded_outputs, padded_outputs, padded_mask)), RNNRegularizer(2.0, 1.0)
        penalties.after_pred(of)  # type: ignore[arg-type]
        penalties.after_loss(of)  # type: ignore[arg-type]
        found.append(of.loss_grad)
    by_hand = 0.0
    for row, n in ((0, 4), (1, 2)):
        own = outputs[row, :n]
        by_hand += 2 * float(own.square().mean()) / 2 + float((own[1:] - own[:-1]).square().mean()) / 2
    assert [float(extra) for extra in found] == pytest.approx([by_hand] * 2)


def test_an_encoder_keeps_its_pads_out_of_training() -> None:
    encoder = AWD_LSTM(20, 6, 8, 1, pad_id=4)
    encoder(torch.tensor([[3, 4]]))[0].sum().backward()
    assert encoder.embedding.weight.grad[4].abs().sum() == 0  # type: ignore[union-attr,index]


def streams(rows: int = 4, steps: int = 5, batches: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    text = tokens(rows, steps * batches + 1, seed)
    return list(zip(text[:, :-1].split(steps, dim=1), text[:, 1:].split(steps, dim=1), strict=True))


def lm_learner(*callbacks: Callback, drop_mult: float = 1.0) -> Learner:
    """A language model with all dropouts and penalties, on streams."""
    return Learner(
        DataLoaders(streams(), streams(2, 5, 2, seed=1)),
        lm(drop_mult=drop_mult),
        CrossEntropyLossFlat(),
        lr=0.01,
        splitter=awd_lstm_lm_split,
        callbacks=[RNNRegularizer(2.0, 1.0), ModelResetter(), *callbacks],
        metrics=[token_accuracy(), Perplexity()],
        device=torch.device("cpu"),
    )


def test_stopped_within_an_epoch_it_goes_on_with_the_state_of_its_streams() -> None:
    torch.manual_seed(0)
    check_goes_on_where_it_stopped(ModelResetter, lm_learner)


def test_metrics_are_over_tokens() -> None:
    learn = lm_learner(drop_mult=0.0)
    learn.dls = DataLoaders([], [(tokens(2, 5), tokens(2, 5, 1)), (tokens(2, 1, 2), tokens(2, 1, 3))])
    with torch.no_grad():
        model = learn.model.eval()
        model.reset()  # type: ignore[operator]
        logits = torch.cat([model(x)[0] for x, _ in learn.dls.valid], dim=1)
    wanted = torch.cat([y for _, y in learn.dls.valid], dim=1)
    found = learn.validate()
    loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()))
    assert found["valid/accuracy"] == pytest.approx(float((logits.argmax(-1) == wanted).double().mean()))
    assert found["valid/loss"] == pytest.approx(loss)
    assert found["valid/perplexity"] == pytest.approx(math.exp(loss))


class Sharded:
    """Rank r's rows of batches that all know."""

    def __init__(self, whole: list[tuple[Tensor, Tensor]], rank: int, world: int):
        self.own = [tuple(x[rank::world] for x in batch) for batch in whole]

    def __len__(self) -> int:
        return len(self.own)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(self.own)


def one_step(whole: list[tuple[Tensor, Tensor]], model: Any, split: Any, rank: int, world: int) -> list[Any]:
    dls = DataLoaders(Sharded(whole, rank, world), Sharded(whole, rank, world))
    resets = [ModelResetter()] if hasattr(model, "reset") else []
    callbacks = [RNNRegularizer(2.0, 1.0), *resets]
    learn = Learner(dls, model, CrossEntropyLossFlat(), SGD, splitter=split, callbacks=callbacks)
    with learn.no_logging():
        learn.fit(2, 0.2)
    weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    return [weights, learn.recorder.history[-1]["valid/loss"]]


def texts_of_classes() -> list[tuple[Tensor, Tensor]]:
    texts = [tokens(1, n, seed=n)[0] for n in (20, 19, 5, 18, 9, 3, 7, 7)]
    return [(padded(texts[:4]), torch.tensor([0, 1, 2, 1])), (padded(texts[4:]), torch.tensor([2, 0, 0, 1]))]


@on_ranks(2)
def training_on_ranks(rank: int, world: int) -> list[Any]:
    found = one_step(streams(), lm(), awd_lstm_lm_split, rank, world)
    quiet = classifier(drop_mult=0.0, ps=(0.0,), seq_len=6, max_len=12).double()  # few rows: BatchNorm magnifies float error
    return found + one_step(texts_of_classes(), quiet, awd_lstm_clas_split, rank, world)


def test_two_ranks_train_what_one_does(ranks_found: Any) -> None:
    alone = one_step(streams(), lm(), awd_lstm_lm_split, 0, 1)
    quiet = classifier(drop_mult=0.0, ps=(0.0,), seq_len=6, max_len=12).double()  # few rows: BatchNorm magnifies float error
    alone += one_step(texts_of_classes(), quiet, awd_lstm_clas_split, 0, 1)
    for rank in ranks_found(training_on_ranks, 2):
        for found, wanted in zip(rank, alone, strict=True):
            torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), rtol=1e-4, atol=1e-5)
