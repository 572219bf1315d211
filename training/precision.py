"""In which precision a Learner trains: `learn.to_bf16()` and the like, and what `precision="auto"` chooses.

Measured on ResNet-18 at 128 px, one thread of an AMD EPYC with AVX-512 BF16 and no AMX, forward, backward and step: float32 23
images/s, with channels last 25, bfloat16 42, both 49. Without such instructions bfloat16 is slower than float32.
"""

from typing import TYPE_CHECKING, Literal

import torch

from training.callback import Callback
from training.mixed_precision import ChannelsLast, MixedPrecision

if TYPE_CHECKING:
    from training.learner import Learner

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def bf16_pays(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def precision_callbacks(precision: Precision, device: torch.device) -> list[Callback]:
    """What a convolutional model trains with. "auto": bfloat16 and channels last where the hardware has bfloat16, said so."""
    match precision:
        case "fp32":
            return []
        case "bf16" | "fp16":
            return [MixedPrecision(torch.bfloat16 if precision == "bf16" else torch.float16), ChannelsLast()]
        case "auto":
            if not bf16_pays(device):
                return []
            print(f"precision: bfloat16 and channels last, which this {device.type} has instructions for", flush=True)
            return [MixedPrecision(), ChannelsLast()]
        case _:
            raise ValueError(f"precision is auto, fp32, bf16 or fp16, not {precision!r}")


def to_bf16(learn: "Learner") -> "Learner":
    """Train in bfloat16 where that is safe; the weights stay float32. Returns the Learner."""
    to_fp32(learn).add_callback(MixedPrecision(torch.bfloat16))
    return learn


def to_fp16(learn: "Learner") -> "Learner":
    """Train in float16 where that is safe, the loss scaled; the weights stay float32. Returns the Learner."""
    to_fp32(learn).add_callback(MixedPrecision(torch.float16))
    return learn


def to_fp32(learn: "Learner") -> "Learner":
    """Train in float32 again. Returns the Learner."""
    for callback in [c for c in learn.callbacks if isinstance(c, MixedPrecision)]:
        learn.remove_callback(callback)
    return learn


def to_channels_last(learn: "Learner") -> "Learner":
    """Keep pictures and convolution weights channels last in memory while training. Returns the Learner."""
    if not any(isinstance(c, ChannelsLast) for c in learn.callbacks):
        learn.add_callback(ChannelsLast())
    return learn


def compile(learn: "Learner") -> "Learner":  # noqa: A001  torch's name for it
    """Have torch compile the model when it is first used; its parameters keep their names. Returns the Learner."""
    learn.model.compile()
    return learn
