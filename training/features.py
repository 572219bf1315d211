"""Frozen-phase features: what the frozen part of a model makes of each row, computed once and fed to the part that trains.

`Phase(epochs, freeze_to=-1, cache_features=True)`, or `fine_tune(4, cache_features=True)`. The features are kept beside the
prepared data, shard by shard, under a fingerprint of the data, the batch transforms and the frozen part with its weights, where
every epoch, rank, trial and later run finds them. During the phase `learn.model` and `learn.dls` stay what they are; batches
come from the features, in the order in which the data would have come, and only the head is run on them.

It is exact: the losses are those without it, to float error. Where they would not be, it is refused, with the reason.
"""

import contextlib
import copy
import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from blocks.dataloaders import DataLoaders
from blocks.derive import derive
from blocks.errors import UserError
from blocks.feed import Feed
from blocks.fingerprint import NotFingerprintable, fingerprint, versions
from blocks.fit import MapWork
from blocks.gather import Shard
from blocks.prepare import map_here
from blocks.prepared import Prepared
from blocks.shards import FixedColumn, fixed_column
from blocks.splits import TRAIN, VALID
from blocks.tensors import as_plain
from blocks.transform import Pipeline, RandTransform
from training import batchnorm, distributed
from training.callback import Callback
from training.layers import AdaptiveConcatPool2d
from training.mixed_precision import ChannelsLast, MixedPrecision
from training.optimizer import NORM_LAYERS, keep_norms_still

if TYPE_CHECKING:
    from training.learner import Learner
    from training.schedule import Phase, Schedule

ROWS = 64  # that the frozen part is given at a time
PROBED = 2  # rows on which is tried whether its output is always the same
NAME = "features"
MODULES_OWN = vars(nn.Module()).keys()

# Layers that hold nothing and draw nothing: at the head's beginning they are computed once, too, and pooled features are small.
_STILL = (AdaptiveConcatPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d, nn.Flatten, nn.Identity)


def not_exact(reason: str) -> UserError:
    """The error that says why the features of a phase cannot be computed once."""
    return UserError(f"cache_features=True would not give the losses it gives without: {reason}")


@dataclass(frozen=True)
class Cut:
    """Where the head begins: the module called `path`, or the children of that Sequential from the `start`-th on."""

    path: str
    start: int | None = None

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """The head as modules that are run one after the other."""
        found = model.get_submodule(self.path)
        return [found] if self.start is None else list(found.children())[self.start :]


@dataclass(frozen=True)
class FrozenPart:
    """Everything before the head, as a function of a shard: what `derive` is given.

    model: a copy, where it predicts. autocast: the precision it works in, None for its own.
    """

    model: nn.Module
    cut: Cut
    batch_tfms: Pipeline
    n_inp: int
    device: torch.device
    autocast: torch.dtype | None
    channels_last: bool

    def __call__(self, table: pa.Table) -> pa.Table:
        """The columns id and part, the features, and the targets as the batch transforms leave them."""
        shard = Shard(table)
        self.model.to(self.device)
        made: list[tuple[np.ndarray, list[Tensor]]] = []
        for part in (TRAIN, VALID):
            of_part = np.flatnonzero(shard.part == part)
            for rows in np.split(of_part, range(ROWS, len(of_part), ROWS)) if len(of_part) else ():
                x, y = self.batch(shard, rows, part)
                made.append((rows, [self.features(x), *y]))
        order = np.argsort(np.concatenate([rows for rows, _ in made]))
        names = [NAME, *list(shard.kinds)[self.n_inp :]]
        columns = [_typed(name, [batch[i] for _, batch in made], order) for i, name in enumerate(names)]
        fields = [table.schema.field("id"), table.schema.field("part"), *(f for f, _ in columns)]
        arrays = [table["id"].combine_chunks(), table["part"].combine_chunks(), *(a for _, a in columns)]
        return pa.Table.from_arrays(arrays, schema=pa.schema([f.remove_metadata() for f in fields[:2]] + fields[2:]))

    def batch(self, shard: Shard, rows: np.ndarray, part: int) -> tuple[list[Any], list[Any]]:
        """Some rows of a shard as the Learner would have them: inputs and targets after the batch transforms."""
        columns: list[Tensor] = []
        for name, kind in shard.kinds.items():
            column = shard.columns[name]
            if not isinstance(column, FixedColumn):
                raise not_exact(f"rows of {name!r} differ in length, and are padded to the longest of their batch")
            columns.append(torch.from_numpy(column.array[rows]).as_subclass(kind).to(self.device))
        keys = torch.zeros(len(rows), dtype=torch.int64, device=self.device)  # nothing is drawn by them
        batch = self.batch_tfms(tuple(columns), split_idx=part, keys=keys)
        return list(batch[: self.n_inp]), list(batch[self.n_inp :])

    def features(self, inputs: Sequence[Any]) -> Tensor:
        """What reaches the head, (rows, ...), in the precision it comes in."""
        return _stopped(self.model, self.cut, self._ready(inputs), self._precision())

    def whole(self, inputs: Sequence[Any]) -> tuple[Any, Any]:
        """What the head gives for some inputs, and what the model does."""
        seen: list[Any] = []
        module = self.model.get_submodule(self.cut.path)
        handle = module.register_forward_hook(lambda module, given, result: seen.append(result))
        try:
            with torch.no_grad(), self._precision():
                result = self.model(*self._ready(inputs))
        finally:
            handle.remove()
        return seen[0] if len(seen) == 1 else None, result

    def _ready(self, inputs: Sequence[Any]) -> list[Any]:
        plain = [as_plain(x) for x in inputs]
        if not self.channels_last:
            return plain
        return [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in plain]

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext()


@dataclass(frozen=True, eq=False)
class Features:
    """The features of a phase, ready to be fed. dls: what the Learner draws from meanwhile."""

    phase: "Phase"
    dls: DataLoaders
    head: list[nn.Module]
    dtype: torch.dtype

    def feed(self, dl: Any) -> bool:
        """Whether `dl` gives features."""
        return dl is self.dls.train or dl is self.dls.valid

    def predict(self, x: Tensor) -> Any:
        """What the model gives for the rows whose features are `x`."""
        x = x.to(self.dtype)  # half precision is kept as float32
        for module in self.head:
            x = module(x)
        return x


def compute_ahead(learn: "Learner", schedule: "Schedule", map_work: MapWork) -> Prepared | None:
    """Compute the features that a training by `schedule` begins with, so that it finds them; None where it needs none."""
    phase = schedule[0]
    if not phase.cache_features:
        return None
    trained = [p.requires_grad for p in learn.model.parameters()]
    try:
        if phase.freeze_to is not None:
            learn.freeze_to(phase.freeze_to, phase.train_bn)
        return features_of(learn, phase, map_work).dls.prepared
    finally:
        for p, trains in zip(learn.model.parameters(), trained, strict=True):
            p.requires_grad_(trains)


def features_of(learn: "Learner", phase: "Phase", map_work: MapWork = map_here) -> Features:
    """The features for a phase of `learn`, whose layers are frozen as it says; computed by `map_work` if they are not there.

    UserError, with the reason, where they would not be exact.
    """
    dls = learn.dls
    prepared, train, valid = _checked_data(dls)
    _check_callbacks(learn.callbacks)
    cut = find_cut(learn.model)
    head = cut.modules(learn.model)
    _check_layers(learn.model, head)
    still = not (learn.train_bn if phase.train_bn is None else phase.train_bn)
    mixed = next((c for c in learn.callbacks if isinstance(c, MixedPrecision)), None)
    model = copy.deepcopy(learn.model).eval()
    batchnorm.undo(model)
    frozen = FrozenPart(
        model=model,
        cut=cut,
        batch_tfms=dls.batch_tfms,
        n_inp=dls.n_inp,
        device=learn.device,
        autocast=None if mixed is None else mixed.dtype,
        channels_last=any(isinstance(c, ChannelsLast) for c in learn.callbacks),
    )
    dtype = _probe(frozen, prepared, still)
    if map_work is not map_here:  # elsewhere
        frozen = replace(frozen, model=frozen.model.cpu(), device=torch.device("cpu"))
    store = derive(prepared, _fingerprint(frozen, prepared), frozen, map_work=map_work)
    if not store.reused and distributed.rank() == 0:
        print(
            f"features: computed once for {store.rows} rows in {store.index['seconds']} s, {store.nbytes / 1e6:.1f} MB",
            flush=True,
        )
    fed = replace(
        dls,
        train=replace(train, prepared=store, pad={}),
        valid=replace(valid, prepared=store, pad={}),
        batch_tfms=Pipeline(),
        n_inp=1,
        prepared=store,
    )
    return Features(phase, fed, head, dtype)


# --- where the head begins ---------------------------------------------------------------------------------------------


def find_cut(model: nn.Module) -> Cut:
    """Where the part of `model` that trains begins. UserError when what trains is not one part at its end."""
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    names = [name for name, does in trains.items() if does]
    if not names or len(names) == len(trains):
        raise not_exact(
            f"the phase trains {'all' if names else 'nothing'} of the model: freeze_to=-1 trains the last group alone"
        )
    path = _common([name.split(".")[:-1] for name in names])
    for length in range(1, len(path) + 1):
        largest = path[:length]
        if _all_train(model.get_submodule(".".join(largest))):
            *above, name = largest
            parent = model.get_submodule(".".join(above))
            within = _end_of(parent, ".".join(above)) if _plain(parent) else None
            if within is None or list(dict(parent.named_children()))[within.start or 0] == name:
                within = _after_still(model, ".".join(largest))
            return within
    parent = model.get_submodule(".".join(path))
    found = _end_of(parent, ".".join(path)) if _plain(parent) else None
    if found is None:
        raise not_exact(f"the phase trains more than the model's last part: {_some(names)}{_of_norms(model)}")
    return found


def _end_of(sequential: nn.Module, path: str) -> Cut | None:
    # The children after the last that has something frozen, from the first on that is more than a rearrangement.
    children = list(sequential.children())
    frozen = [i for i, child in enumerate(children) if not _all_train(child)]
    if not frozen or any(p.requires_grad for child in children[: frozen[-1] + 1] for p in child.parameters()):
        return None
    start = frozen[-1] + 1
    while isinstance(children[start], _STILL):
        start += 1
    return Cut(path, start)


def _after_still(model: nn.Module, path: str) -> Cut:
    head = model.get_submodule(path)
    if not _plain(head):
        return Cut(path)
    start = next(i for i, child in enumerate(head.children()) if not isinstance(child, _STILL))
    return Cut(path, start)


def _plain(module: nn.Module) -> bool:
    # Whether it runs its children one after the other, and does nothing else.
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _all_train(module: nn.Module) -> bool:
    return all(p.requires_grad for p in module.parameters())


def _common(paths: Sequence[Sequence[str]]) -> list[str]:
    common = list(paths[0])
    for path in paths[1:]:
        same = next((i for i, (a, b) in enumerate(zip(common, path, strict=False)) if a != b), min(len(common), len(path)))
        common = common[:same]
    return common


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _of_norms(model: nn.Module) -> str:
    norms = (p for m in model.modules() if isinstance(m, NORM_LAYERS) for p in m.parameters(recurse=False))
    training = any(p.requires_grad for p in norms)
    return (
        "; normalisation layers of frozen groups train, unless the Learner or the phase has train_bn=False" if training else ""
    )


# --- whether it would be exact -----------------------------------------------------------------------------------------


def _checked_data(dls: Any) -> tuple[Prepared, Feed, Feed]:
    train, valid = getattr(dls, "train", None), getattr(dls, "valid", None)
    if not isinstance(dls, DataLoaders) or not isinstance(train, Feed) or not isinstance(valid, Feed):
        raise not_exact("only rows that a DataBlock has prepared are known again in each epoch: use block.dataloaders(source)")
    if train.prepared.encode.each_epoch.transforms:
        raise not_exact(f"item transforms are random, so a row is another one each epoch: {train.prepared.encode.each_epoch}")
    if train.samples is not None or valid.samples is not None:
        raise not_exact("samples are windows or streams, not whole rows")
    if train.sort_by_length is not None:
        raise not_exact(f"rows are sorted by the length of {train.sort_by_length!r}, and padded to the longest of their batch")
    random = [t for t in dls.batch_tfms.transforms if any(isinstance(part, RandTransform) for part in (t, *t.parts))]
    if random:
        raise not_exact(f"a batch transform is random on training data: {Pipeline(tuple(random))}")
    return train.prepared, train, valid


def _check_callbacks(callbacks: Sequence[Callback]) -> None:
    for callback in callbacks:
        if not callback.run:
            continue
        needs = callback.needs_inputs
        if needs or (needs is None and type(callback).before_batch is not Callback.before_batch):
            raise not_exact(
                f"{callback.name} may look at the inputs of a batch or change them (if it does neither, say so in its class: "
                "needs_inputs = False)"
            )


def _check_layers(model: nn.Module, head: Sequence[nn.Module]) -> None:
    of_head = {id(m) for part in head for m in part.modules()}
    for name, module in model.named_modules():
        if id(module) in of_head:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise not_exact(f"{name!r} of the frozen part is {module}, which is random in training")
        if module._forward_hooks or module._forward_pre_hooks:
            raise not_exact(f"{name or type(module).__name__!r} of the frozen part has a hook, which would no longer be called")


def _probe(frozen: FrozenPart, prepared: Prepared, still: bool) -> torch.dtype:
    # On a few rows: the frozen part gives the same in training as in validation, and the head is all that comes after it.
    shard = Shard(prepared.table(0))
    part = int(shard.part[0])
    rows = np.flatnonzero(shard.part == part)[:PROBED]
    model = frozen.model.to(frozen.device)
    devices = [frozen.device] if frozen.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # the head's dropout is to draw what it draws without
        x, y = frozen.batch(shard, rows, TRAIN)
        again = [column for columns in frozen.batch(shard, rows, TRAIN) for column in columns]
        if not all(_equal(a, b) for a, b in zip([*x, *y], again, strict=True)):
            raise not_exact(f"the batch transforms give something else each time: {frozen.batch_tfms}")
        one, of_one = frozen.batch(shard, rows[:1], TRAIN)
        if not all(_close(a[:1], b) for a, b in zip([*x, *y], [*one, *of_one], strict=True)):
            raise not_exact(f"what the batch transforms make of a row depends on the others of its batch: {frozen.batch_tfms}")
        expected = frozen.features(x)
        if not _close(expected[:1], frozen.features(one)):
            raise not_exact("what the frozen part makes of a row depends on the others of its batch")
        of_head, result = frozen.whole(x)
        if of_head is None or of_head is not result:
            raise not_exact(f"{frozen.cut.path!r} trains, but its output is not the model's: something follows it")
        model.train()
        if still:
            keep_norms_still(model)
        try:
            in_training = frozen.features(x)
            norms = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        finally:
            model.eval()
    of_head_names = [n for n, m in model.named_modules() if any(m is part for part in frozen.cut.modules(model))]
    norms = [n for n in norms if not any(n == h or n.startswith(f"{h}.") for h in of_head_names)]
    if norms:
        raise not_exact(f"normalisation takes the statistics of each batch in {_some(norms)}: train_bn=False keeps it still")
    if not _equal(expected, in_training):
        raise not_exact("the frozen part gives something else in training, as dropout does")
    return expected.dtype


def _close(a: Any, b: Any) -> bool:
    # But for the float error of half precision.
    if a.shape != b.shape:
        return False
    one, other = as_plain(a).float(), as_plain(b).float()
    return bool((one - other).abs().max() <= 0.05 * one.abs().max()) if one.numel() else True


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(as_plain(a), as_plain(b))


# --- computing ---------------------------------------------------------------------------------------------------------


class _Reached(Exception):
    """The forward pass has come to the head."""

    def __init__(self, given: tuple[Any, ...]):
        self.given = given


def _stopped(model: nn.Module, cut: Cut, inputs: Sequence[Any], precision: contextlib.AbstractContextManager[Any]) -> Tensor:
    def stop(module: nn.Module, given: tuple[Any, ...]) -> None:
        raise _Reached(given)

    handle = cut.modules(model)[0].register_forward_pre_hook(stop)
    try:
        with torch.no_grad(), precision:
            model(*inputs)
    except _Reached as reached:
        if len(reached.given) != 1 or not isinstance(reached.given[0], Tensor) or len(reached.given[0]) != len(inputs[0]):
            raise not_exact(f"{cut.path!r}, which trains, is not given one tensor with a row for each of the batch") from None
        return reached.given[0]
    finally:
        handle.remove()
    raise not_exact(f"{cut.path!r}, which trains, is not used by the model")


def _typed(name: str, batches: Sequence[Tensor], order: np.ndarray) -> tuple[pa.Field, pa.Array]:
    joined = torch.cat([as_plain(b).cpu() for b in batches])
    array = (joined.float() if joined.dtype is torch.bfloat16 else joined).numpy()
    return fixed_column(name, array[order], type(batches[0]))


def _fingerprint(frozen: FrozenPart, prepared: Prepared) -> str:
    try:
        return fingerprint(prepared.fingerprint, versions(), torch.__version__, _identity(frozen), frozen.batch_tfms)
    except NotFingerprintable:  # a batch transform without a lasting identity
        return uuid.uuid4().hex[:16]


def _identity(frozen: FrozenPart) -> list[Any]:
    of_head = {id(m) for part in frozen.cut.modules(frozen.model) for m in part.modules()}
    weights = hashlib.sha256()
    structure: list[Any] = []
    for name, module in frozen.model.named_modules():
        if id(module) in of_head:
            continue
        structure += [name, type(module), _settings(module)]
        for own in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            weights.update(f"{own[0]}:{own[1].dtype}:{tuple(own[1].shape)}".encode())
            weights.update(own[1].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    path, start = frozen.cut.path, frozen.cut.start
    return [weights.hexdigest(), structure, path, start, str(frozen.autocast), frozen.n_inp]


def _settings(module: nn.Module) -> dict[str, Any]:
    # What a layer knows beside its weights and parts, such as a stride or a function.
    return {
        name: str(value) if isinstance(value, torch.dtype | torch.device) else value
        for name, value in sorted(vars(module).items())
        if name not in MODULES_OWN
    }
