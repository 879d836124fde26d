"""Reference implementations for parity tests: imports them, and copies their weights under our names."""
import re
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

Rules = list[tuple[str, str]]                # (regular expression of their name, replacement)
_keep: list[torch.library.Library] = []


def reference(name: str) -> ModuleType:
    """The module, or the test is skipped. timm, open_clip, transformers, diffusers and lpips import torchvision, whose compiled operators may be
    absent: their names are declared, which is enough for pure Python code to import."""
    ask_for_it = ("timm", "open_clip", "transformers", "diffusers", "lpips", "peft", "bitsandbytes", "torchscale")
    if name.split(".")[0] in ask_for_it and not _keep and not hasattr(torch.ops.torchvision, "nms"):
        _keep.append(torch.library.Library("torchvision", "DEF"))
        for op in ("nms", "qnms", "roi_align", "qroi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
            for side in (op, f"_{op}_backward"):
                _keep[0].define(f"{side}(Tensor x) -> Tensor")
    return pytest.importorskip(name)


def shake(module: nn.Module) -> nn.Module:
    """Random weights and running statistics everywhere, so that no term is hidden by a zero or a one; eval mode."""
    for name, t in module.state_dict().items():
        if t.is_floating_point():
            t.copy_(torch.rand(t.shape) + 0.5 if "var" in name else torch.randn(t.shape) * (t[0].numel() ** -0.5 if t.ndim > 1 else 0.2)
                    + (1.0 if t.ndim == 1 and name.endswith("weight") else 0.0))
    return module.eval()


def renamed(state: dict[str, Tensor], rules: Rules, width: int = 0) -> dict[str, Tensor]:
    """Their state under our names; a fused `qkv` of 3*width rows is split. Names that become "" are dropped."""
    out = {}
    for name, value in state.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        if "qkv" in name:
            out |= {name.replace("qkv", k): v for k, v in zip("qkv", value.split(width), strict=True)}
        elif name:
            out[name] = value
    return out


def pour(ours: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Loads every value, reshaped where ours has leading axes of 1; refuses missing and extra names. Eval mode."""
    shapes = {k: v.shape for k, v in ours.state_dict().items()}
    ours.load_state_dict({k: v.reshape(shapes[k]) if k in shapes else v for k, v in state.items()})
    return ours.eval()
