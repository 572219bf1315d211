"""Plain PyTorch code becomes a Learner's piece by piece (Howard & Gugger, arXiv:2002.04688): four steps.

Each step replaces one piece of a script and leaves the others as they are; where nothing is meant to change, nothing does.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from blocks import CategoryBlock, DataBlock, DataLoaders, ImageBlock, RandomSplitter, Resize, get_image_files, parent_label
from training import Callback, GradientClip, Learner, accuracy

GENERATOR = torch.Generator().manual_seed(5)
X, Y = torch.randn(60, 4, generator=GENERATOR), torch.randint(3, (60,), generator=GENERATOR)


class Net(nn.Module):
    """A module that knows nothing of us."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.other = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.other(F.relu(self.one(x))), dim=1)


def loaders() -> tuple[DataLoader, DataLoader]:
    order = torch.Generator().manual_seed(3)
    train = DataLoader(TensorDataset(X[:48], Y[:48]), batch_size=16, shuffle=True, generator=order)
    return train, DataLoader(TensorDataset(X[48:], Y[48:]), batch_size=16)


def the_script(clip: float | None = None) -> tuple[Net, float]:
    """What there was before: two epochs written out, and the mean loss of the validation data."""
    model, (train, valid) = Net(), loaders()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        model.train()
        for x, y in train:
            F.nll_loss(model(x), y).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        total = sum(F.nll_loss(model(x), y, reduction="sum").item() for x, y in valid)
    return model, total / 12


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for name, weight in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], weight), name


def test_step_1_the_loop_goes_the_rest_stays() -> None:
    """Model, DataLoaders, loss function and optimizer of torch, as they are: the Learner is the loop, with the same bits."""
    learn = Learner(DataLoaders(*loaders()), Net(), F.nll_loss, partial(torch.optim.SGD, momentum=0.9), lr=0.1)
    learn.fit(2)
    model, loss = the_script()
    assert_same_weights(learn.model, model)
    assert learn.recorder.history[-1]["valid/loss"] == pytest.approx(loss, rel=1e-6)


def test_step_2_what_stood_in_the_loop_becomes_callbacks() -> None:
    class Clip(Callback):
        def before_step(self, learn: Learner) -> None:
            nn.utils.clip_grad_norm_(learn.model.parameters(), 0.1)

    model, _ = the_script(clip=0.1)
    for callback in (Clip(), GradientClip(0.1)):
        learn = Learner(
            DataLoaders(*loaders()), Net(), F.nll_loss, partial(torch.optim.SGD, momentum=0.9), lr=0.1, callbacks=[callback]
        )
        learn.fit(2)
        assert_same_weights(learn.model, model)


def test_step_3_schedules_metrics_and_tools_come_without_a_change_to_the_pieces() -> None:
    learn = Learner(DataLoaders(*loaders()), Net(), F.nll_loss, partial(torch.optim.SGD, momentum=0.9), metrics=accuracy)
    found = learn.lr_find(num_it=30)
    assert found.lrs[0] < found.suggestions["valley"] < found.lrs[-1]
    learn.fit_one_cycle(8, 0.3)
    assert learn.recorder.history[-1]["train/loss"] < learn.recorder.history[0]["train/loss"]
    assert 0 <= learn.recorder.history[-1]["valid/accuracy"] <= 1
    assert learn.get_preds()[0].shape == (12, 3)


def test_step_4_the_data_becomes_a_datablock(few_digits: Path) -> None:
    """Then the loss, names of classes, pictures and exports follow from the data; the model is still a plain module."""
    block = DataBlock(
        blocks=(ImageBlock(), CategoryBlock()),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=RandomSplitter(0.25, seed=1),
        item_tfms=Resize(8),
    )
    torch.manual_seed(1)
    dls = block.dataloaders(few_digits, batch_size=32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    learn = Learner(dls, model, lr=1e-2, metrics=accuracy)
    learn.fit_one_cycle(4)
    assert learn.recorder.history[-1]["valid/accuracy"] > 0.8
    assert learn.predict(next((few_digits / "1").iterdir())).decoded in dls.vocab


def test_the_loss_of_twenty_seeded_steps_is_the_stored_one() -> None:
    """A change of the loop that changes what is computed shows here. Twenty steps of Adam by one_cycle on a small net."""
    rows = [(X[i : i + 12], Y[i : i + 12]) for i in range(0, 60, 12)]
    learn = Learner(DataLoaders(rows), Net(), F.nll_loss)
    learn.fit_one_cycle(4, 1e-2)
    found = [values["train/loss"] for values in learn.recorder.history]
    assert found == pytest.approx([1.0895328, 1.0799527, 1.0671954, 1.0605093], rel=1e-5)
