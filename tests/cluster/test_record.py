"""A script's own fit is recorded when asked: here or on workers, whatever its data and however it ends."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from blocks import DataBlock, DataLoaders
from cluster import Workers, record
from cluster.places import places
from training import Callback, CancelFitException, Learner, accuracy, flat, torchvision_classifier

pytestmark = pytest.mark.usefixtures("store")


def recorded(experiment: str) -> list[Run]:
    client = MlflowClient(places().tracking)
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id], order_by=["start_time"]))


@pytest.fixture
def plain() -> Learner:
    """Nothing of ours but the Learner."""
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    loader = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=20)
    return Learner(DataLoaders(loader, loader), nn.Linear(4, 2), cross_entropy, torch.optim.SGD, lr=0.1, metrics=accuracy)


def test_a_fit_in_plain_pytorch(plain: Learner, capsys: pytest.CaptureFixture[str]) -> None:
    """Each fit is a run; what cannot be exported is no reason to fail."""
    plain.add_callback(record("mine", note="first"))
    plain.fit(2)
    plain.fit(flat(1), 0.5)
    first, second = recorded("mine")
    assert [first.info.status, second.info.status] == ["FINISHED", "FINISHED"]
    assert first.data.params == {
        "schedule": "flat(2)", "lr": "0.1", "model": "Linear", "loss": "cross_entropy", "opt": "SGD", "batch_size": "20",
        "note": "first",
    }  # fmt: skip
    assert second.data.params["lr"] == "0.5"
    history = MlflowClient(places().tracking).get_metric_history(first.info.run_id, "valid/accuracy")
    assert [(m.step, m.value) for m in history] == [(v["epoch"], v["valid/accuracy"]) for v in plain.recorder.history[:2]]
    assert MlflowClient(places().tracking).search_logged_models([first.info.experiment_id]) == []
    assert f"record: run {first.info.run_id} in sqlite:///" in capsys.readouterr().out


class Ends(Callback):
    def __init__(self, error: type[BaseException]):
        self.error = error

    def before_epoch(self, learn: Learner) -> None:
        if learn.epoch == 1:
            raise self.error


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED"), (CancelFitException, "FINISHED")]
)
def test_every_end_of_a_fit(error: type[BaseException], status: str, plain: Learner) -> None:
    if error is CancelFitException:
        plain.fit(3, callbacks=[record("ends"), Ends(error)])
    else:
        with pytest.raises(error):
            plain.fit(3, callbacks=[record("ends"), Ends(error)])
    (run,) = recorded("ends")
    assert run.info.status == status
    assert run.data.metrics.keys() >= {"train/loss", "valid/accuracy", "hp/lr", "time/stall"}


@pytest.fixture
def digits(few_digits: Path, digits_block: DataBlock) -> Callable[[], Learner]:
    dls = digits_block.dataloaders(few_digits, batch_size=30)
    return lambda: Learner(dls, torchvision_classifier(arch="shufflenet_v2_x0_5", n_out=3), metrics=accuracy)


def test_a_model_of_ones_own(digits: Callable[[], Learner]) -> None:
    """No registered builder made it, so it cannot be exported: that is noted, and is no reason to fail."""
    learn = Learner(digits().dls, nn.Sequential(nn.Flatten(), nn.LazyLinear(3)))
    learn.model(learn.dls.one_batch()[0])
    learn.fit(1, callbacks=[record("own")])
    (run,) = recorded("own")
    assert run.info.status == "FINISHED"
    assert "was not made by a registered builder" in run.data.tags["fastray.no_model"]


def check_digits_run(run: Run) -> None:
    client = MlflowClient(places().tracking)
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [0, 1]
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"pictures", "plan.txt"}
    assert run.inputs.dataset_inputs[0].dataset.digest == run.data.tags["fastray.fingerprint"]
    assert len(run.outputs.model_outputs) == 1


def test_data_of_a_datablock(digits: Callable[[], Learner]) -> None:
    """The data set, its plan and pictures, and the model, too."""
    digits().fit(2, callbacks=[record("digits")])
    (run,) = recorded("digits")
    check_digits_run(run)


@pytest.mark.usefixtures("ray_running")
def test_a_fit_on_workers(digits: Callable[[], Learner]) -> None:
    learn = digits()
    learn.fit(2, on=Workers(2), callbacks=[record("workers")])
    (run,) = recorded("workers")
    check_digits_run(run)
    assert run.data.metrics["valid/accuracy"] == learn.recorder.history[-1]["valid/accuracy"]
