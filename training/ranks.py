"""What a Learner that trains on several ranks needs of the others: one gradient, and one mind about stopping.

Gradients are summed over the ranks in buckets whose layout depends on the model alone, from the first step on, so that a
resumed run adds in the same order as the unbroken one. Three small things ride in the first bucket: over how many rows (or
what else the loss counts) each rank's loss was a mean, which makes the sum the gradient of the mean over all of them; the
votes of ranks on which a callback wants to cancel something; and whether a rank asks for a checkpoint.

**Agreement.** A cancel raised on one rank must not leave the others waiting in a collective. Within a training batch it is
a vote: the rank stays in step, with weight zero, until the gradients are summed; then all ranks raise the strongest cancel
that any has voted for, and that batch leaves no gradient. After the sum, a cancel of the step or the batch is taken to be
raised alike on all ranks (as accumulation does) and acts at once; one of more than the batch is a vote for the next sum.
Outside of batches, ranks agree after each event; a validation part agrees once, at its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training import batchnorm
from training.callback import (
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
)
from training.distributed import begin_sum, buckets_of, copy_from_first, let_go_of_the_group, rank, sum_over_ranks

# The weakest first.
CANCELS: tuple[type[CancelException], ...] = (
    CancelBackwardException,
    CancelStepException,
    CancelBatchException,
    CancelTrainException,
    CancelValidException,
    CancelEpochException,
    CancelFitException,
)
WITHIN_A_BATCH = CANCELS[:3]


@dataclass
class _Bucket:
    """Some parameters, and a flat tensor for their gradients, a mark for each that has one, and in the first what rides."""

    parameters: list[nn.Parameter]
    flat: Tensor
    missing: int = 0
    work: Any = None

    def views(self) -> list[Tensor]:
        sizes = [p.numel() for p in self.parameters]
        parts = self.flat[: sum(sizes)].split(sizes)
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def marks(self) -> Tensor:
        start = sum(p.numel() for p in self.parameters)
        return self.flat[start : start + len(self.parameters)]


class Ranks:
    """This rank's side of a training of `model` on all ranks, from its making to its `end`. Every rank makes one.

    sync_bn: BatchNorm takes the statistics of the global batch; else of each rank's rows, which is faster and other than what
    one process does.
    """

    def __init__(self, model: nn.Module, sync_bn: bool = True):
        self.model = model
        self.parameters = list(model.parameters())
        self.votes = torch.zeros(len(CANCELS))
        self.asks = self.asked = False  # for a checkpoint: this rank, with the next gradient; some rank, with the last one
        self.owes_gradients = False  # the others will wait for this rank's share of the batch's gradient
        self._layouts: dict[tuple[bool, ...], list[_Bucket]] = {}
        self._bucket_of: dict[nn.Parameter, _Bucket] = {}
        self._ready: list[_Bucket] = []
        self._launched = 0
        self._rides: Tensor = self.votes
        self._hooks: dict[nn.Parameter, Any] = {}
        copy_from_first([*self.parameters, *model.buffers()])
        normalised = batchnorm.over_ranks(model, sync_bn)
        _say_once(batchnorm.in_words(model, sync_bn))
        # BatchNorm sums in the backward pass, too. Collectives are matched by order: a bucket that is ready early on one rank
        # and late on another, which has no use for one of its parameters, would meet the sum of a layer.
        self._waits = sync_bn and normalised

    def end(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        batchnorm.borrow_rows(False)
        batchnorm.undo(self.model)
        let_go_of_the_group()

    def begin_batch(self, training: bool, borrowed: bool) -> None:
        """A batch was drawn. borrowed: its rows are another rank's, here only to stay in step."""
        self.owes_gradients = training
        batchnorm.borrow_rows(borrowed)

    # --- agreement -----------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether this rank waits for the others to agree to a cancel."""
        return bool(self.votes.any())

    def takes(self, cancel: CancelException, training: bool, in_batch: bool) -> bool:
        """Whether `cancel` is noted here, to take effect when all ranks agree; else it is to be raised now."""
        if in_batch and not training:
            return False
        if in_batch and not self.owes_gradients and isinstance(cancel, WITHIN_A_BATCH):
            return False
        self.vote(cancel)
        return True

    def vote(self, cancel: CancelException) -> None:
        """Note that this rank wants `cancel`."""
        self.votes[next(i for i, kind in enumerate(CANCELS) if isinstance(cancel, kind))] = 1

    def agree(self) -> None:
        """Raise the strongest cancel that any rank has voted for, on all ranks. Every rank must call it."""
        total = sum_over_ranks(self.votes)
        self.votes.zero_()
        _raise_strongest(total)

    # --- gradients -----------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, count: Tensor | float) -> None:
        """Differentiate the mean `loss` over `count` rows of this rank; gradients become those of the mean over all ranks'.

        A parameter that no rank used has none. Raises the cancel that is agreed to, gradients then being what they were.
        """
        buckets = self._layout()
        held = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        count = torch.as_tensor(0.0 if self.pending else count, dtype=torch.float32)
        self._rides = torch.cat([count.detach().cpu().view(1), torch.tensor([float(self.asks)]), self.votes])
        self._ready, self._launched = buckets, 0
        for bucket in buckets:
            bucket.missing = len(bucket.parameters)
        (loss * count.to(loss.device, loss.dtype)).backward()
        self._launch(buckets[self._launched :])
        for bucket in buckets:
            if bucket.work is not None:
                bucket.work.wait()
        self.owes_gradients = False
        total, asked, votes = buckets[0].flat[-len(self._rides) :].cpu().split([1, 1, len(self.votes)])
        self.asked = bool(asked)
        self.votes.zero_()
        try:
            _raise_strongest(votes)
        except CancelException:
            for p, gradient in zip(self.parameters, held, strict=True):
                p.grad = gradient
            raise
        self._take(buckets, float(total) or 1.0)  # nothing counted: no gradient either
        for p, gradient in zip(self.parameters, held, strict=True):
            if gradient is not None:
                p.grad = gradient if p.grad is None else gradient.add_(p.grad)

    def _layout(self) -> list[_Bucket]:
        # By what trains at this moment: freezing, or two nets that take turns, change it.
        trains = tuple(p.requires_grad for p in self.parameters)
        if trains not in self._layouts:
            self._layouts[trains] = self._new_layout([p for p in self.parameters if p.requires_grad])
        buckets = self._layouts[trains]
        self._bucket_of = {p: bucket for bucket in buckets for p in bucket.parameters}
        return buckets

    def _new_layout(self, parameters: Sequence[nn.Parameter]) -> list[_Bucket]:
        # From the last parameter to the first, about the order in which the backward pass reaches them.
        for p in parameters:
            if p not in self._hooks:
                self._hooks[p] = p.register_post_accumulate_grad_hook(self._arrived)
        groups = buckets_of(list(reversed(parameters))) or [[]]  # what rides needs one
        buckets = []
        for number, group in enumerate(groups):
            like = group[0] if group else self.votes
            size = sum(p.numel() for p in group) + len(group) + (2 + len(self.votes)) * (number == 0)
            wide = torch.promote_types(like.dtype, torch.float32)
            buckets.append(_Bucket(group, torch.zeros(size, dtype=wide, device=like.device)))
        return buckets

    def _arrived(self, p: Tensor) -> None:
        # Buckets start in their order on every rank: collectives are matched by order.
        if self._waits or self._launched == len(self._ready):
            return  # or it is a callback's own backward pass
        self._bucket_of[p].missing -= 1  # type: ignore[index]
        while self._launched < len(self._ready) and self._ready[self._launched].missing == 0:
            self._launch([self._ready[self._launched]])

    def _launch(self, buckets: Sequence[_Bucket]) -> None:
        for bucket in buckets:
            for p, view in zip(bucket.parameters, bucket.views(), strict=True):
                if p.grad is None:
                    view.zero_()
                else:
                    view.copy_(p.grad)
            bucket.marks().copy_(torch.tensor([p.grad is not None for p in bucket.parameters]))
            if self._launched == 0:
                bucket.flat[-len(self._rides) :] = self._rides.to(bucket.flat)
            bucket.work = begin_sum(bucket.flat)
            self._launched += 1

    def _take(self, buckets: Sequence[_Bucket], total: float) -> None:
        for bucket in buckets:
            for p, view, mark in zip(bucket.parameters, bucket.views(), bucket.marks(), strict=True):
                if p.grad is None and mark > 0:  # others used it
                    p.grad = torch.empty_like(p)
                if p.grad is not None:
                    torch.div(view, total, out=p.grad)


_said: set[str] = set()


def _say_once(words: str) -> None:
    if words and rank() == 0 and words not in _said:
        _said.add(words)
        print(words, flush=True)


def _raise_strongest(votes: Tensor) -> None:
    asked = [cancel for cancel, number in zip(CANCELS, votes.tolist(), strict=True) if number]
    if asked:
        raise asked[-1]
