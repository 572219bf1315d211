"""Schedules as values: they compare, print, are read back, and their curves are fastai's."""

import json
import math
from collections.abc import Callable

import pytest

from training import Curve, Phase, Schedule, fine_tune, flat, flat_cos, gradual_unfreeze, one_cycle, sgdr
from training.expressions import read_expression
from training.schedule import SCHEDULES, as_words, scaled, schedule_from_plain, schedule_to_plain, top_and_spread, total_epochs

EXAMPLES = [
    flat(3),
    one_cycle(5),
    one_cycle(2, pct_start=0.5, div=10, div_final=100, spread=30),
    fine_tune(4),
    fine_tune(2, freeze_epochs=3, lr_mult=10),
    fine_tune(1, freeze_epochs=0),
    fine_tune(4, cache_features=True),
    gradual_unfreeze(4, cache_features=True),
    flat_cos(3),
    flat_cos(3, pct_start=0.5),
    sgdr(3, 1),
    sgdr(2, 2, cycle_mult=1),
    gradual_unfreeze(2),
    gradual_unfreeze(3, stages=2, stage_epochs=2, decay=3),
    (Phase(1, freeze_to=-2, train_bn=False), Phase(2, momentum=Curve(((0.0, 0.9), (0.5, 0.8))), spread=7.5), *flat(1)),
]
each_example = pytest.mark.parametrize("schedule", EXAMPLES)


@pytest.mark.parametrize("make", [lambda: flat(3), lambda: one_cycle(3), lambda: fine_tune(3)])
def test_a_schedule_is_a_value(make: Callable[[], Schedule]) -> None:
    assert make() == make()
    assert make() is not make()
    assert len({make(), make(), flat(99)}) == 2


def test_other_numbers_are_another_schedule() -> None:
    assert len(set(EXAMPLES)) == len(EXAMPLES)
    assert one_cycle(5) != one_cycle(5, pct_start=0.3)


@each_example
def test_a_printed_schedule_is_read_back(schedule: Schedule) -> None:
    assert read_expression(repr(schedule), SCHEDULES) == schedule
    assert read_expression(as_words(schedule), SCHEDULES) == schedule


@each_example
def test_plain_and_back_through_json(schedule: Schedule) -> None:
    plain = schedule_to_plain(schedule)
    assert schedule_from_plain(plain) == schedule
    assert schedule_from_plain(json.loads(json.dumps(plain))) == schedule
    assert hash(schedule_from_plain(json.loads(json.dumps(plain)))) == hash(schedule)


def test_plain_is_numbers_lists_and_dicts() -> None:
    """What JSON keeps as it is: a tuple, say, would come back as a list."""
    plain = [schedule_to_plain(schedule) for schedule in EXAMPLES]
    assert json.loads(json.dumps(plain)) == plain


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (flat(3), "flat(3)"),
        (one_cycle(5), "one_cycle(5)"),
        (fine_tune(4), "fine_tune(4, freeze_epochs=1)"),
        (fine_tune(2, freeze_epochs=3), "fine_tune(2, freeze_epochs=3)"),
        (fine_tune(2, freeze_epochs=0), "fine_tune(2, freeze_epochs=0)"),
        (fine_tune(4, cache_features=True), "fine_tune(4, freeze_epochs=1, cache_features=True)"),
        (flat_cos(3), "flat_cos(3)"),
        (sgdr(3, 1), "sgdr(3, 1)"),
        (gradual_unfreeze(2, stages=2), "gradual_unfreeze(2, stages=2, stage_epochs=1)"),
        ("resnet18", "resnet18"),
        (0.5, "0.5"),
        (None, "None"),
        ((1, 2), "(1, 2)"),
        ((), "()"),
    ],
)
def test_as_words_is_the_shortest_call(schedule: object, words: str) -> None:
    assert as_words(schedule) == words


def test_as_words_of_a_schedule_of_no_short_name_is_its_repr() -> None:
    assert as_words(one_cycle(5, div=7)) == repr(one_cycle(5, div=7))


@pytest.mark.parametrize(("schedule", "epochs"), [(flat(3), 3), (fine_tune(4), 5), (fine_tune(4, freeze_epochs=3), 7)])
def test_total_epochs(schedule: Schedule, epochs: int) -> None:
    assert total_epochs(schedule) == epochs


# --- curves ------------------------------------------------------------------------------------------------------------


def combined_cos(pct: float, start: float, middle: float, end: float) -> Callable[[float], float]:
    """fastai's, written from its documentation: half a cosine up to `pct`, half a cosine from there on."""

    def cos(a: float, b: float, pos: float) -> float:
        return a + (1 + math.cos(math.pi * (1 - pos))) * (b - a) / 2

    return lambda pos: cos(start, middle, pos / pct) if pos < pct else cos(middle, end, (pos - pct) / (1 - pct))


@pytest.mark.parametrize("pct_start", [0.25, 0.3, 0.99])
def test_one_cycle_is_fastais(pct_start: float) -> None:
    (phase,) = one_cycle(5, pct_start=pct_start, div=25, div_final=1e5)
    lr, momentum = combined_cos(pct_start, 1 / 25, 1, 1e-5), combined_cos(pct_start, 0.95, 0.85, 0.95)
    for position in [0, *(k / 97 for k in range(97)), pct_start, 1]:
        assert phase.lr.at(position) == pytest.approx(lr(position), rel=1e-9)
        assert phase.momentum is not None
        assert phase.momentum.at(position) == pytest.approx(momentum(position), rel=1e-9)


def test_one_cycle_at_its_corners() -> None:
    (phase,) = one_cycle(5)
    assert [phase.lr.at(p) for p in (0, 0.25, 1)] == pytest.approx([1 / 25, 1, 1e-5])
    assert phase.momentum is not None
    assert [phase.momentum.at(p) for p in (0, 0.25, 1)] == pytest.approx([0.95, 0.85, 0.95])


def test_one_cycle_rises_and_falls() -> None:
    (phase,) = one_cycle(5)
    rates = [phase.lr.at(k / 100) for k in range(101)]
    assert rates[:26] == sorted(set(rates[:26]))
    assert rates[25:] == sorted(set(rates[25:]), reverse=True)


def test_fine_tune_is_fastais() -> None:
    """Frozen at the full rate with pct_start=0.99, then all at half of it, the first group at 1/100, div=5."""
    frozen, whole = fine_tune(4)
    assert (frozen.epochs, frozen.freeze_to, frozen.spread) == (1, -1, 1)
    assert [frozen.lr.at(p) for p in (0, 0.99, 1)] == pytest.approx([1 / 25, 1, 1e-5])
    assert (whole.epochs, whole.freeze_to, whole.spread) == (4, 0, 100)
    assert [whole.lr.at(p) for p in (0, 0.3, 1)] == pytest.approx([0.5 / 5, 0.5, 0.5 / 1e5])


def test_flat_cos_is_fastais() -> None:
    (phase,) = flat_cos(4)
    assert [phase.lr.at(p) for p in (0, 0.74, 0.75, 0.875, 1)] == pytest.approx([1, 1, 1, (1 + 1e-5) / 2, 1e-5])
    assert phase.momentum is None


def test_sgdr_is_fastais() -> None:
    """Each cycle a cosine from the rate to nothing, twice as long as the one before."""
    cycles = sgdr(3, 1)
    assert [phase.epochs for phase in cycles] == [1, 2, 4]
    assert all([phase.lr.at(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0]) for phase in cycles)


def test_gradual_unfreeze_frees_a_group_a_stage() -> None:
    phases = gradual_unfreeze(2, stages=3, decay=2, spread=100)
    assert [p.freeze_to for p in phases] == [-1, -2, -3, 0]
    assert [p.epochs for p in phases] == [1, 1, 1, 2]
    assert [p.spread for p in phases] == [1, 100, 100, 100]
    assert [p.lr.at(0.25) for p in phases] == pytest.approx([1, 1 / 2, 1 / 4, 1 / 8])
    assert [p.cache_features for p in gradual_unfreeze(2, cache_features=True)] == [True, False, False, False]


def test_the_momentum_of_a_cycle_is_given_as_moms() -> None:
    (phase,) = one_cycle(1, moms=(0.9, 0.5, 0.7))
    assert phase.momentum is not None
    assert [phase.momentum.at(p) for p in (0, 0.25, 1)] == pytest.approx([0.9, 0.5, 0.7])


@pytest.mark.parametrize(
    ("lr", "expected"), [(0.1, (0.1, 1)), (slice(0.01, 0.1), (0.1, 10)), (slice(0.1), (0.1, 10)), (slice(0.1, 0.1), (0.1, 1))]
)
def test_rates_of_groups(lr: float | slice, expected: tuple[float, float]) -> None:
    assert top_and_spread(lr) == pytest.approx(expected)


def test_rates_are_scaled_together() -> None:
    assert scaled(0.5, 0.5) == 0.25
    assert scaled(slice(0.5, 1.0), 0.5) == slice(0.25, 0.5)
    assert scaled(slice(1.0), 0.5) == slice(None, 0.5)


@pytest.mark.parametrize("lr", [slice(None), slice(0.1, 0.01), slice(0.1, None), slice(1e-3, 1e-2, 3), slice(-1.0, 1.0)])
def test_rates_that_are_none_are_refused(lr: slice) -> None:
    with pytest.raises(ValueError, match=r"slice\(first, last\)"):
        top_and_spread(lr)


def test_a_curve_stays_at_its_last_value_and_a_single_point_is_flat() -> None:
    curve = Curve(((0.0, 1.0), (0.5, 3.0)))
    assert [curve.at(p) for p in (0, 0.25, 0.5, 0.75, 1)] == [1, pytest.approx(2), 3, 3, 3]
    assert {Curve(((0.0, 2.0),)).at(p) for p in (0, 0.5, 1)} == {2}


def test_a_curve_may_jump() -> None:
    curve = Curve(((0.0, 1.0), (0.5, 1.0), (0.5, 9.0), (1.0, 9.0)))
    assert [curve.at(p) for p in (0.49, 0.5, 0.51)] == [1, 9, 9]


# --- bad values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: flat(0),
        lambda: flat(-1),
        lambda: one_cycle(0),
        lambda: fine_tune(0),
        lambda: fine_tune(1, freeze_epochs=-1),
        lambda: Phase(1, spread=0.5),
        lambda: fine_tune(1, lr_mult=0),
        lambda: Curve(()),
        lambda: Curve(((0.1, 1.0),)),
        lambda: Curve(((0.0, 1.0), (1.5, 1.0))),
        lambda: Curve(((0.0, 1.0), (0.5, 1.0), (0.4, 1.0))),
        lambda: one_cycle(1, pct_start=1.5),
        lambda: one_cycle(1, pct_start=-0.1),
        lambda: flat_cos(1, pct_start=2),
        lambda: sgdr(0, 1),
        lambda: gradual_unfreeze(1, stages=0),
    ],
)
def test_values_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"at least|at most"):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: one_cycle(1, div=0),
        lambda: one_cycle(1, div_final=0),
        lambda: fine_tune(1, div=0),
        lambda: one_cycle(1, pct_start=math.nan),
        lambda: Phase(1, spread=math.nan),
        lambda: flat(2.5),  # type: ignore[arg-type]
        lambda: Phase(1, lr=0.1),  # type: ignore[arg-type]
    ],
    ids=["div=0", "div_final=0", "fine_tune div=0", "pct_start=nan", "spread=nan", "epochs=2.5", "lr=0.1"],
)
def test_values_that_would_fail_in_training_are_refused_when_made(make: Callable[[], object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        make()
