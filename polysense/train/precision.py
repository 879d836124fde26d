"""Which number format a stage computes in: bf16 autocast where the hardware multiplies bf16 matrices, else fp32."""
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from polysense.base.errors import UserError

Autocast = Callable[[bool], AbstractContextManager[Any]]


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 matrix products (AMX or AVX512-BF16 on a CPU; Ampere and later GPUs)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def resolve(precision: str, device: torch.device) -> str:
    """`auto` -> `bf16` or `fp32`; the other two stand for themselves. Raises UserError for another word."""
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"no precision {precision!r}", "it is auto, bf16 or fp32")
    return ("bf16" if has_bf16(device) else "fp32") if precision == "auto" else precision


def autocast(precision: str, device: torch.device) -> Autocast:
    """A function of on/off that opens the autocast context of a stage.

    `off` inside `on` switches it off for backward passes while the casts of the weights, made once, stay in the cache of the outer one.
    """
    use = resolve(precision, device) == "bf16"
    return lambda on: torch.autocast(device.type, torch.bfloat16, enabled=use and on)
