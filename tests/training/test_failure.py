"""An exception of the loop says once where it was raised: whose code, epoch, batch, rows, and the person's own line."""

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blocks import DataLoaders
from tests.training.toy import batches, data, deep, doing, learner
from training import AvgMetric, CancelFitException, Learner
from training.failure import Failure, failure_of, is_own_file


def fail(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("mine")  # the line that is told


def failed(learn: Learner, run: Callable[[Learner], Any] = lambda learn: learn.fit(2)) -> Failure:
    with pytest.raises(ZeroDivisionError, match="mine") as raised:
        run(learn)
    found = failure_of(raised.value)
    assert found is not None
    assert raised.value.__notes__ == [str(found)]
    assert (found.file, found.function) == (__file__, "fail")
    assert pickle.loads(pickle.dumps(found)) == found  # noqa: S301
    return found


class FailsAt(nn.Linear):
    """A layer that fails the n-th time it is used."""

    left = 4

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        return fail() if self.left < 0 else super().forward(x)


class Batches(list[Any]):
    """Batches of which the third cannot be drawn."""

    def __iter__(self) -> Iterator[Any]:
        yield from self[:2]
        fail()


class Row(tuple[Any, ...]):
    """A batch whose rows have ids."""

    @property
    def ids(self) -> list[str]:
        return [f"{i}.png" for i in range(len(self[0]))]


def test_the_model() -> None:
    found = failed(learner(model=nn.Sequential(nn.Linear(3, 5), FailsAt(5, 2))))
    assert (found.source, found.name) == ("model", "layer 1 (FailsAt)")
    assert (found.epoch, found.batch, found.part) == (0, 1, "validation")
    assert str(found) == f"in the model's layer 1 (FailsAt), epoch 0, validation batch 1; {__file__}:{found.line} in fail"


def test_a_layer_of_torchs_has_no_line_of_ones_own() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        learner(model=nn.Sequential(nn.Linear(3, 5), nn.Linear(4, 2))).fit(1)
    assert raised.value.__notes__ == ["in the model's layer 1 (Linear), epoch 0, batch 0"]


def test_the_loss() -> None:
    found = failed(learner(loss_func=fail))
    assert (found.source, found.epoch, found.batch, found.part) == ("loss", 0, 0, "training")


@pytest.mark.parametrize("when", ["accumulate", "value"])
def test_a_metric(when: str) -> None:
    def mine(pred: Tensor, targ: Tensor) -> Tensor:
        return fail() if when == "accumulate" else (pred.argmax(1) == targ).float().mean()

    found = failed(learner(metrics=AvgMetric(mine, then=fail)))
    assert (found.source, found.name, found.epoch) == ("metric", "mine", 0)
    assert found.batch == (0 if when == "accumulate" else None)


def test_the_optimizer() -> None:
    class Mine(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            fail()

    assert failed(learner(opt_func=lambda groups: Mine(groups, lr=0.1))).source == "optimizer"
    assert failed(learner(opt_func=fail)).source == "optimizer"
    assert failed(learner(splitter=fail)).source == "splitter"


def test_a_gradient() -> None:
    class Backward(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(fail)

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Backward.apply(x)

    assert failed(learner(model=nn.Sequential(nn.Linear(3, 2), Layer()))).source == "backward"


def test_data_that_cannot_be_drawn() -> None:
    learn = learner(DataLoaders(Batches(batches((4, 4, 4))), batches((4,))))
    found = failed(learn)
    assert (found.source, found.epoch, found.batch, found.rows) == ("data", 0, 2, ())


@pytest.mark.parametrize(
    ("event", "epoch", "batch", "part"),
    [
        ("before_fit", 0, None, "training"),
        ("before_epoch", 1, None, "validation"),
        ("after_loss", 1, 2, "training"),
        ("after_cancel_fit", 1, None, "validation"),
        ("after_fit", 2, None, "validation"),
    ],
)
def test_a_callback(event: str, epoch: int, batch: int | None, part: str) -> None:
    def act(learn: Learner) -> None:
        if (learn.epoch, learn.iter) == (epoch, batch) or (batch is None and learn.epoch == epoch):
            fail()

    def stop(learn: Learner) -> None:
        if event == "after_cancel_fit" and learn.epoch == 1:
            raise CancelFitException

    rows = DataLoaders([Row(b) for b in batches((5, 5, 5))], batches((4,)))
    learn = learner(rows, callbacks=[doing(event, act), doing("before_epoch", stop)])
    learn.iter, learn.training = -1, True
    found = failed(learn)
    assert (found.source, found.name, found.event) == ("callback", "Doing", event)
    assert (found.batch, found.part) == (batch, part)
    assert found.epoch == (None if event == "after_fit" else epoch)
    assert found.rows == (tuple(f"{i}.png" for i in range(5)) if batch is not None else ())
    assert ("rows 0.png, 1.png, 2.png and 2 more" in str(found)) == (batch is not None)


def test_validating_and_predicting_outside_of_a_fit() -> None:
    model = nn.Sequential(FailsAt(3, 2))
    model[0].left = 1
    found = failed(learner(model=model), lambda learn: learn.validate())
    assert (found.source, found.epoch, found.batch, found.part) == ("model", None, 1, "validation")
    model[0].left = 0
    assert failed(learner(model=model), lambda learn: learn.get_preds()).batch == 0


def test_one_note_where_learners_are_nested() -> None:
    inner = learner(loss_func=fail)
    found = failed(learner(callbacks=[doing("before_batch", lambda _: inner.fit(1))]))
    assert found.source == "loss"
    outer = learner(callbacks=[doing("after_epoch", lambda learn: learn.get_preds(), order=5)], model=deep())
    outer.model.register_forward_hook(lambda *_: fail() if outer.recorder.history else None)  # in get_preds
    found = failed(outer)
    assert (found.source, found.epoch, found.part) == ("model", 0, "validation")


def test_what_a_callback_catches_is_nobodys_business() -> None:
    def try_it(learn: Learner) -> None:
        with pytest.raises(ZeroDivisionError):
            fail()

    learner(callbacks=[doing("before_batch", try_it)]).fit(1)


def test_an_exception_with_slots() -> None:
    class Slotted(Exception):
        __slots__ = ()

    def raise_it(*_: Any) -> Any:
        raise Slotted

    with pytest.raises(Slotted) as raised:
        learner(data(), loss_func=raise_it).fit(1)
    assert raised.value.__notes__[0].startswith("in the loss, epoch 0, batch 0")


def test_whose_a_file_is() -> None:
    assert is_own_file(__file__)
    assert is_own_file("<stdin>")
    assert is_own_file("/home/me/pets.py")
    for theirs in (torch.__file__, pickle.__file__, "<frozen runpy>", "<string>", Failure.__init__.__code__.co_filename):
        assert not is_own_file(theirs)
