"""Transforms: chosen by type, composed, undone, and plain data for an export."""

import json
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from plum import dispatch

from blocks import (
    Categorize,
    IntToFloatTensor,
    Normalize,
    OpenImage,
    Pipeline,
    Resize,
    TensorBase,
    TensorCategory,
    TensorImage,
    TensorImageBW,
    ToTensor,
    Transform,
)
from blocks.transform import _REGISTRY, FunctionTransform, as_transform, transform_from_plain


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


# --- the contract of our own transforms --------------------------------------------------------------------------------

EXAMPLES: list[Transform] = [
    Categorize(),
    Categorize(("cat", "dog")),
    OpenImage(),
    OpenImage(mode="L"),
    Resize(8),
    Resize((8, 12)),
    ToTensor(),
    IntToFloatTensor(),
    Normalize((0.5,), (0.25,)),
    Normalize.from_stats((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
]


def test_every_transform_of_blocks_has_an_example() -> None:
    ours = {cls for cls in _REGISTRY.values() if cls.__module__.startswith("blocks.")}
    assert {type(t) for t in EXAMPLES} == ours - {FunctionTransform}


@pytest.mark.parametrize("transform", EXAMPLES, ids=repr)
class TestContract:
    def test_pickles(self, transform: Transform) -> None:
        copy = pickle.loads(pickle.dumps(transform))  # noqa: S301  our own bytes
        assert type(copy) is type(transform)
        assert copy == transform

    def test_plain_and_back(self, transform: Transform) -> None:
        plain = json.loads(json.dumps(transform.to_plain()))
        assert plain["name"] == type(transform).__name__
        back = transform_from_plain(plain)
        assert type(back) is type(transform)
        assert back == transform
        assert back.to_plain() == transform.to_plain()

    def test_an_unknown_type_passes_or_is_refused(self, transform: Transform) -> None:
        """Only the first transform of a column takes any object; others let it pass."""
        stranger = object()
        if isinstance(transform, OpenImage | Categorize):
            with pytest.raises((TypeError, ValueError), match="object"):
                transform(stranger)
        else:
            assert transform(stranger) is stranger
            assert transform.decode(stranger) is stranger

    def test_wrong_fields(self, transform: Transform) -> None:
        with pytest.raises(ValueError, match="has the fields"):
            transform_from_plain(transform.to_plain() | {"surprise": 1})


def test_a_pipeline_is_plain_data_and_back() -> None:
    pipeline = Pipeline.of(EXAMPLES)
    assert Pipeline.from_plain(json.loads(json.dumps(pipeline.to_plain()))) == pipeline


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
