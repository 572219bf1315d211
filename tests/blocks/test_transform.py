"""Transforms: chosen by type, composed, undone, and plain data for an export."""

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from blocks import (
    ItemTransform,
    Pipeline,
    RandTransform,
    TensorBase,
    TensorCategory,
    TensorImage,
    TensorImageBW,
    TensorMask,
    Transform,
    dispatch,
)
from blocks.fingerprint import fingerprint
from blocks.lighting import RandomErasing
from blocks.transform import _REGISTRY, as_transform, transform_from_plain


@dataclass
class Add(Transform):
    """Adds to whole numbers."""

    n: int = 1

    def encodes(self, x: int) -> int:
        return x + self.n

    def decodes(self, x: int) -> int:
        return x - self.n


@dataclass
class Double(Transform):
    """Runs after Add, wherever it stands."""

    order: ClassVar[int] = 5

    def encodes(self, x: int) -> int:
        return x * 2

    def decodes(self, x: int) -> int:
        return x // 2


@dataclass
class Named(Transform):
    """Says which of its methods was chosen."""

    @dispatch
    def encodes(self, x: int) -> str:
        return "int"

    @dispatch  # type: ignore[no-redef]
    def encodes(self, x: str) -> str:  # noqa: F811
        return "str"

    @dispatch  # type: ignore[no-redef]
    def encodes(self, x: TensorImage) -> str:  # noqa: F811
        return "image"


@dataclass
class NamedAgain(Named):
    """Has its own method for whole numbers, and one for what the base does not know."""

    @dispatch
    def encodes(self, x: int) -> str:
        return "my int"

    @dispatch  # type: ignore[no-redef]
    def encodes(self, x: float) -> str:  # noqa: F811
        return "my float"


@dataclass
class NamedOnce(Named):
    """Overrides one of several methods without @dispatch."""

    def encodes(self, x: str) -> str:  # type: ignore[override]
        return "my str"


# --- which method ------------------------------------------------------------------------------------------------------


def test_a_value_of_another_type_passes_through() -> None:
    unknown = object()
    assert Add(2)(3) == 5
    assert Add(2)("three") == "three"
    assert Add(2)(unknown) is unknown
    assert Add(2).decode(5) == 3
    assert Add(2).decode("five") == "five"


def test_a_transform_without_methods_passes_everything() -> None:
    @dataclass
    class Nothing(Transform):
        pass

    assert Nothing()(3) == 3
    assert Nothing().decode("x") == "x"


@pytest.mark.parametrize(("value", "name"), [(1, "int"), ("a", "str"), (torch.ones(1).as_subclass(TensorImage), "image")])
def test_one_of_several_methods_is_chosen(value: Any, name: str) -> None:
    assert Named()(value) == name


def test_a_method_serves_subclasses() -> None:
    assert Named()(torch.ones(1).as_subclass(TensorImageBW)) == "image"
    assert Named()(True) == "int"


def test_several_methods_let_other_types_pass() -> None:
    plain = torch.ones(1)
    assert Named()(plain) is plain
    assert Named()(2.5) == 2.5


def test_a_subclass_overrides_one_method_and_inherits_the_others() -> None:
    image = torch.ones(1).as_subclass(TensorImage)
    assert [NamedAgain()(v) for v in (1, "a", image, 1.5, None)] == ["my int", "str", "image", "my float", None]
    assert [Named()(v) for v in (1, 1.5)] == ["int", 1.5]  # the base is as before


def test_a_subclass_overrides_one_of_several_without_dispatch() -> None:
    assert [NamedOnce()(v) for v in (1, "a")] == ["int", "my str"]


def test_a_subclass_inherits_decodes() -> None:
    @dataclass
    class AddTwice(Add):
        def encodes(self, x: int) -> int:
            return x + 2 * self.n

    assert AddTwice(3)(1) == 7
    assert AddTwice(3).decode(7) == 4


def test_a_class_of_the_same_name_starts_afresh() -> None:
    """As when a notebook's cell is run again: no method of the first class is left in the second."""

    def local(word: str) -> Transform:
        @dataclass
        class Local(Transform):
            if word == "both":

                @dispatch
                def encodes(self, x: str) -> str:
                    return f"{word} str"

            @dispatch  # type: ignore[no-redef]
            def encodes(self, x: int) -> str:
                return f"{word} int"

        return Local()

    assert [local("both")(v) for v in (1, "a")] == ["both int", "both str"]
    assert [local("one")(v) for v in (1, "a")] == ["one int", "a"]


def test_a_tuple_is_transformed_element_by_element() -> None:
    assert Add(1)((1, "a", (2, None))) == (2, "a", (3, None))
    assert Add(1).decode((2, "a", (3, None))) == (1, "a", (2, None))


def test_a_list_is_one_value() -> None:
    assert Add(1)([1, 2]) == [1, 2]


# --- what comes out ----------------------------------------------------------------------------------------------------


def test_a_result_keeps_the_type_of_the_argument() -> None:
    @dataclass
    class Halve(Transform):
        def encodes(self, x: TensorBase) -> torch.Tensor:
            return torch.from_numpy(x.numpy() / 2)

    assert type(Halve()(torch.ones(2).as_subclass(TensorImageBW))) is TensorImageBW


def test_a_result_of_a_more_special_type_stays() -> None:
    @dataclass
    class Grey(Transform):
        def encodes(self, x: TensorImage) -> TensorImageBW:
            return x[:1].as_subclass(TensorImageBW)

        def decodes(self, x: TensorImageBW) -> TensorCategory:
            return x.as_subclass(TensorCategory)

    grey = Grey()(torch.ones(3, 2, 2).as_subclass(TensorImage))
    assert type(grey) is TensorImageBW
    assert type(Grey().decode(grey)) is TensorCategory


# --- pipelines ---------------------------------------------------------------------------------------------------------


def test_order_comes_from_the_transforms() -> None:
    assert Pipeline.of([Double(), Add(1)])(3) == 8
    assert Pipeline.of([Add(1), Double()])(3) == 8


def test_equal_order_keeps_the_given_order() -> None:
    assert Pipeline.of([lambda x: x + "a", lambda x: x + "b"])("") == "ab"


def test_adding_pipelines_orders_them_anew() -> None:
    assert (Pipeline.of(Double) + Pipeline.of(Add(1)))(3) == 8


def test_decode_runs_in_reverse() -> None:
    pipeline = Pipeline.of([Add(1), Double()])
    assert pipeline.decode(8) == 3
    assert pipeline.decode(pipeline((5, "a"))) == (5, "a")


def test_split_idx() -> None:
    @dataclass
    class TrainOnly(Add):
        split_idx: ClassVar[int | None] = 0

    pipeline = Pipeline.of([TrainOnly(10), Add(1)])
    assert [pipeline(0, split_idx=part) for part in (0, 1, None)] == [11, 1, 1]


def test_what_a_pipeline_is_made_of() -> None:
    assert Pipeline.of(None) == Pipeline.of([]) == Pipeline()
    assert Pipeline.of(Add) == Pipeline.of(Add()) == Pipeline.of(t for t in [Add(1)])
    assert Pipeline()(3) == Pipeline().decode(3) == 3
    with pytest.raises(TypeError, match="not 3"):
        Pipeline.of([3])  # type: ignore[list-item]


def test_a_pipeline_in_a_pipeline_keeps_order_and_decodes() -> None:
    """As when batch_tfms=Pipeline.of([Normalize(...)]) meets the block's own IntToFloatTensor."""
    pipeline = Pipeline.of(Pipeline.of([Double()])) + Pipeline.of(Add(1))
    assert pipeline(3) == 8
    assert pipeline.decode(8) == 3


def test_a_plain_function_is_a_transform() -> None:
    pipeline = Pipeline.of([str.upper, Add(1)])
    assert pipeline("a") == "A"
    assert pipeline.decode("A") == "A"


def test_a_pipeline_prints_its_steps() -> None:
    assert str(Pipeline.of([Double(), str.upper, Add(2)])) == "upper -> Add(n=2) -> Double()"
    assert str(Pipeline()) == "nothing"


# --- plain data of our own ---------------------------------------------------------------------------------------------


def test_missing_field() -> None:
    with pytest.raises(ValueError, match=r"has the fields \['mean', 'std'\]"):
        transform_from_plain({"name": "Normalize", "mean": [0.5]})


@pytest.mark.parametrize("plain", [{"name": "os.system"}, {"name": ""}, {"size": 3}, {"name": "Add", "n": 1}])
def test_unknown_name(plain: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="unknown transform"):
        transform_from_plain(plain)


def test_a_users_transform_is_named_by_its_module() -> None:
    plain = Add(3).to_plain()
    assert plain == {"name": f"{__name__}:Add", "n": 3}
    assert transform_from_plain(plain) == Add(3)


def test_a_users_class_does_not_stand_in_for_ours() -> None:
    before = _REGISTRY["Resize"]

    @dataclass
    class Resize(Transform):  # the name is the point
        pass

    assert _REGISTRY["Resize"] is before


def test_a_function_cannot_be_exported() -> None:
    def shout(text: str) -> str:
        return text.upper()

    with pytest.raises(ValueError, match="'shout' is code"):
        as_transform(shout).to_plain()


def test_plain_data_makes_no_function() -> None:
    with pytest.raises(ValueError, match="unknown transform"):
        transform_from_plain({"name": "FunctionTransform", "function": "print"})


# --- random transforms -------------------------------------------------------------------------------------------------


@dataclass
class Shift(RandTransform):
    """Adds what is drawn by each sample's key, to pictures; to masks, ten times that."""

    size: int = 3

    def draw(self, x: Any, keys: torch.Tensor) -> torch.Tensor:
        return keys % self.size

    @dispatch
    def encodes(self, x: TensorImage, drawn: Any) -> torch.Tensor:
        return x + drawn.view(-1, 1, 1, 1)

    @dispatch  # type: ignore[no-redef]
    def encodes(self, x: TensorMask, drawn: Any) -> torch.Tensor:  # noqa: F811
        return x + 10 * drawn.view(-1, 1, 1)


KEYS = torch.tensor([7, 2, 3])
PICTURES = torch.zeros(3, 1, 2, 2).as_subclass(TensorImage)
MASKS = torch.zeros(3, 2, 2).as_subclass(TensorMask)


def test_the_elements_of_a_sample_get_what_was_drawn_once() -> None:
    picture, mask, label = Shift()((PICTURES, MASKS, "cat"), keys=KEYS)
    assert picture[:, 0, 0, 0].tolist() == [1, 2, 0]
    assert mask[:, 0, 0].tolist() == [10, 20, 0]
    assert label == "cat"
    assert (type(picture), type(mask)) == (TensorImage, TensorMask)


def test_a_sample_alone_is_as_in_a_batch() -> None:
    together = Shift()(PICTURES, keys=KEYS)
    alone = [Shift()(PICTURES[i : i + 1], keys=KEYS[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_a_random_transform_runs_on_training_data_and_needs_keys_there() -> None:
    pipeline = Pipeline.of([Shift(), lambda x: x * 2])
    assert pipeline(PICTURES, split_idx=0, keys=KEYS).max() == 4
    assert pipeline(PICTURES, split_idx=1).max() == pipeline(PICTURES).max() == 0
    with pytest.raises(ValueError, match="Shift draws by the keys of the samples"):
        pipeline(PICTURES, split_idx=0)


def test_a_random_transform_is_plain_data_too() -> None:
    assert Shift(5, p=0.5).to_plain() == {"name": f"{__name__}:Shift", "p": 0.5, "size": 5}
    assert transform_from_plain(Shift(5, p=0.5).to_plain()) == Shift(5, p=0.5)
    with pytest.raises(ValueError, match=r"probability from 0 to 1, not 1\.5"):
        Shift(p=1.5)


# --- whole samples -----------------------------------------------------------------------------------------------------


@dataclass
class Swap(ItemTransform):
    """Exchanges the two elements of a sample."""

    def encodes(self, x: tuple[Any, ...]) -> tuple[Any, ...]:
        return x[::-1]

    def decodes(self, x: tuple[Any, ...]) -> tuple[Any, ...]:
        return x[::-1]


def test_an_item_transform_sees_the_whole_sample() -> None:
    assert Swap()((1, "a")) == ("a", 1)
    assert Swap().decode(("a", 1)) == (1, "a")
    assert Swap()(3) == 3
    assert Pipeline.of([Swap(), Add(1)])((1, "a")) == ("a", 2)


def test_an_item_transform_keeps_types_element_by_element() -> None:
    @dataclass
    class Halves(ItemTransform):
        def encodes(self, x: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(e.as_subclass(torch.Tensor) / 2 for e in x)

    assert [type(e) for e in Halves()((PICTURES, MASKS))] == [TensorImage, TensorMask]


# --- neighbours that compose -------------------------------------------------------------------------------------------


@dataclass
class Plus(Transform):
    """Adds; two in a row are one."""

    n: int = 1

    def encodes(self, x: int) -> int:
        return x + self.n

    def compose_with(self, other: Transform) -> Transform | None:
        return Plus(self.n + other.n) if isinstance(other, Plus) else None


def test_neighbours_are_composed() -> None:
    assert Pipeline.of([Plus(1), Plus(2), str.upper, Plus(3), Plus(4)]).transforms == (
        Plus(3),
        *Pipeline.of(str.upper).transforms,
        Plus(7),
    )
    assert (Pipeline.of(Plus(1)) + Pipeline.of([Double(), Plus(2)])).transforms == (Plus(3), Double())


# --- functions ---------------------------------------------------------------------------------------------------------


def test_a_function_acts_on_the_type_it_is_annotated_with() -> None:
    def longer(text: str) -> str:
        return text + "!"

    def either(x: int | str | None) -> str:
        return f"<{x}>"

    def every(x: list[int]) -> Any:
        return x

    assert Pipeline.of(longer)(("a", 1, ("b",))) == ("a!", 1, ("b!",))
    assert Pipeline.of(either)((1, "a", 2.5)) == ("<1>", "<a>", 2.5)
    assert Pipeline.of(every)(3) == 3
    assert Pipeline.of(lambda x: x * 2)((1, "a")) == (2, "aa")
    assert Pipeline.of(len)(("abc",)) == (3,)


# --- plain data --------------------------------------------------------------------------------------------------------


@dataclass
class Several(Transform):
    """Holds other transforms, as a composition does."""

    parts: tuple[Transform, ...] = ()
    best: Transform | None = None
    sizes: tuple[tuple[int, ...], ...] = ()
    named: dict[str, Any] = field(default_factory=dict)


def test_nested_transforms_and_tuples_are_plain_data_and_back() -> None:
    several = Several((Add(1), Several((Double(),))), Add(2), ((1, 2), ()), {"a": (1, None)})
    plain = json.loads(json.dumps(several.to_plain()))
    assert transform_from_plain(plain) == several
    assert fingerprint(transform_from_plain(plain)) == fingerprint(several) != fingerprint(Several())


@pytest.mark.parametrize("value", [len, torch.ones(1), [1], {1: 2}, {"name": "Add"}, (1, {2})])
def test_what_is_not_plain_data_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Several\.best holds .*, which is not plain data"):
        Several(best=value).to_plain()


def test_no_field_may_be_called_name() -> None:
    with pytest.raises(TypeError, match="cannot be called 'name'"):

        @dataclass
        class Person(Transform):
            name: str


def test_the_second_of_a_kind_draws_other_numbers_than_the_first() -> None:
    x = torch.zeros(4, 3, 8, 8).as_subclass(TensorImage)
    erase = RandomErasing(p=1, sl=0.2)
    keys = torch.arange(4)
    once, twice = (Pipeline.of([erase] * n)(x, split_idx=0, keys=keys) != 0 for n in (1, 2))
    assert twice.sum() > once.sum()
