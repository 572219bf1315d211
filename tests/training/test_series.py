"""Models of series: shapes, causality, what any forecast is to beat, quantiles."""

import pytest
import torch

from blocks import DataLoaders
from training import AgainstNaive, L1LossFlat, Learner, QuantileLoss, mae, naive_forecast
from training.models import ModelSpec
from training.series import TCN, InceptionTime, NLinear, ResNet1d


@pytest.mark.parametrize("model", [InceptionTime(2, 3, width=4, depth=3), ResNet1d(2, 3, (4, 8))])
@pytest.mark.parametrize("steps", [5, 60])
def test_classifiers_take_any_length(model: torch.nn.Module, steps: int) -> None:
    assert model(torch.randn(4, steps, 2)).shape == (4, 3)


@pytest.mark.parametrize("model", [InceptionTime(2, 3, width=4, depth=3), ResNet1d(2, 3, (4, 8))])
def test_a_short_series_is_told_alike_in_any_company(model: torch.nn.Module) -> None:
    short, padded = torch.randn(2, 9, 2), torch.randn(3, 30, 2)
    padded[:2, 9:] = torch.nan
    padded[:2, :9] = short
    model(padded).sum().backward()  # its statistics are those of the steps that are there
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    alone = type(model)(2, 3, **({"width": 4, "depth": 3} if isinstance(model, InceptionTime) else {"widths": (4, 8)}))
    alone.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.train()(padded[:2]), alone.train()(short))
    torch.testing.assert_close(model.eval()(padded)[:2], alone.eval()(short))
    torch.testing.assert_close(model.state_dict(), alone.state_dict())


@pytest.mark.parametrize("model", [NLinear(12, 4), TCN(2, 4, width=8, depth=3)])
def test_forecasts_move_with_the_series(model: torch.nn.Module) -> None:
    x = torch.randn(3, 12, 2)
    ahead = model(x)
    assert ahead.shape == (3, 4, 2)
    torch.testing.assert_close(model(x + 100), ahead + 100, rtol=1e-3, atol=1e-3)


def test_forecasts_of_quantiles() -> None:
    assert NLinear(12, 4, 3)(torch.randn(5, 12, 2)).shape == (5, 4, 2, 3)
    assert TCN(2, 4, width=8, depth=2, n_quantiles=3)(torch.randn(5, 12, 2)).shape == (5, 4, 2, 3)
    assert NLinear(12, 4, 1)(torch.randn(5, 12, 2)).shape == (5, 4, 2, 1)


def test_a_linear_forecast_against_its_formula() -> None:
    model, x = NLinear(5, 2), torch.randn(3, 5, 1)
    last = x[:, -1, 0]
    wanted = (x[:, :, 0] - last[:, None]) @ model.linear.weight.T + model.linear.bias + last[:, None]
    torch.testing.assert_close(model(x)[:, :, 0], wanted)


def test_what_was_there_a_season_before() -> None:
    x = torch.arange(6.0).view(1, 6, 1)
    assert naive_forecast(x, 5, 3).flatten().tolist() == [3, 4, 5, 3, 4]
    assert naive_forecast(x, 2).flatten().tolist() == [5, 5]
    with pytest.raises(ValueError, match="season of 7 steps"):
        naive_forecast(x, 2, 7)


def test_the_naive_error_stands_beside_the_models() -> None:
    x = torch.arange(40.0).view(8, 5, 1)
    batches = [(x[i : i + 3], x[i : i + 3, -1:] + 1) for i in range(0, 8, 3)]
    learn = Learner(DataLoaders(batches, batches), NLinear(5, 1), L1LossFlat(), metrics=mae, callbacks=[AgainstNaive()])
    with learn.no_logging():
        learn.fit(1)
    assert learn.recorder.history[0]["valid/mae_naive"] == pytest.approx(1)
    assert "valid/mae" in learn.recorder.history[0]
    learn.recorder.values.clear()
    learn.get_preds()
    assert learn.recorder.values == {}


def test_the_best_constant_under_a_quantile_loss_is_the_quantile() -> None:
    values = torch.arange(101.0)
    loss = QuantileLoss(quantiles=(0.1, 0.9))
    errors = [float(loss(torch.tensor([q, 90.0]).expand(101, 2), values)) for q in range(101)]
    assert errors.index(min(errors)) == 10
    assert loss.decodes(torch.tensor([[1.0, 2.0]])).tolist() == [2.0]
    assert QuantileLoss(quantiles=(0.5, 0.9)).decodes(torch.tensor([[1.0, 2.0]])).tolist() == [1.0]
    with pytest.raises(ValueError, match="rising order"):
        QuantileLoss(quantiles=(0.9, 0.1))
    with pytest.raises(ValueError, match="not 2 quantiles of"):
        loss(torch.zeros(4, 3), torch.zeros(4))


@pytest.mark.parametrize(
    ("builder", "arguments"),
    [
        ("inception_time", {"n_in": 1, "n_out": 2, "width": 4, "depth": 3}),
        ("resnet1d", {"n_in": 1, "n_out": 2}),
        ("nlinear", {"steps": 5, "horizon": 2}),
        ("tcn", {"channels": 1, "horizon": 2}),
    ],
)
def test_they_are_built_again_from_plain_data(builder: str, arguments: dict[str, int]) -> None:
    assert ModelSpec(builder, arguments).build().spec == ModelSpec(builder, arguments)
