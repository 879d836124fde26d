"""Initialisations for the slot `Transformer.Config.init`: values that build a function of the module."""
from dataclasses import dataclass
from math import log

from torch import nn

from polysense.base.spec import Configured, Spec


class NormalInit(Configured):
    """Every linear: truncated normal of deviation `std`, biases zero (BERT, GPT-2, timm's ViT, MAE)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        std: float = 0.02

    def __init__(self, c: Config):
        self.std = c.std

    def __call__(self, body: nn.Module) -> None:
        for m in body.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=self.std, a=-2 * self.std, b=2 * self.std)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)


class FanInInit(Configured):
    """Every linear: weight and bias uniform within 1/sqrt(inputs), as torch's layers are born (diffusion models, released code)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        pass

    def __init__(self, c: Config):
        pass

    def __call__(self, body: nn.Module) -> None:
        for m in body.modules():
            if isinstance(m, nn.Linear):
                m.reset_parameters()


class XavierInit(Configured):
    """Glorot uniform; biases zero, of the MLP normal(1e-6) (the JAX code of Dosovitskiy et al. 2021)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        pass

    def __init__(self, c: Config):
        pass

    def __call__(self, body: nn.Module) -> None:
        for name, m in body.named_modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.normal_(m.bias, std=1e-6) if ".mlp." in name else nn.init.zeros_(m.bias)


class ClipInit(Configured):
    """CLIP (Radford et al. 2021, released code): with d the width and L the depth, q k v have deviation d^-1/2, the MLP's first linear
    (2d)^-1/2, and both linears that write to the residual stream d^-1/2 (2L)^-1/2; biases zero."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        pass

    def __init__(self, c: Config):
        pass

    def __call__(self, body: nn.Module) -> None:
        depth = len(body.blocks)  # type: ignore[arg-type]
        for name, m in body.named_modules():
            if isinstance(m, nn.Linear):
                role = name.rsplit(".", 1)[-1]
                if role in ("out", "down"):
                    std = m.out_features ** -0.5 * (2 * depth) ** -0.5
                else:
                    std = (2 * m.in_features) ** -0.5 if role in ("up", "gate") else m.in_features ** -0.5
                nn.init.normal_(m.weight, std=std)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)


class RescaledInit(Configured):
    """NormalInit, then both linears that write to the residual stream of layer l, from 1, divided by sqrt(2 l) (Bao et al. 2022, section 2.5)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        std: float = 0.02

    def __init__(self, c: Config):
        self.std = c.std

    def __call__(self, body: nn.Module) -> None:
        NormalInit(NormalInit.Config(std=self.std))(body)
        for i, block in enumerate(body.blocks):  # type: ignore[arg-type]
            for linear in block.writers() if hasattr(block, "writers") else (block.attn.out, block.mlp.down):
                linear.weight.data.div_((2 * (i + 1)) ** 0.5)


class SubNormInit(Configured):
    """NormalInit, then values, outputs of attention and both linears of the MLP times sqrt(log(2 L)), for a depth of L (Wang et al. 2022,
    Foundation Transformers, section 2.3)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        std: float = 0.02

    def __init__(self, c: Config):
        self.std = c.std

    def __call__(self, body: nn.Module) -> None:
        NormalInit(NormalInit.Config(std=self.std))(body)
        gain = log(2 * len(body.blocks)) ** 0.5  # type: ignore[arg-type]
        for name, m in body.named_modules():
            if isinstance(m, nn.Linear) and name.rsplit(".", 1)[-1] in ("v", "out", "up", "down"):
                m.weight.data.mul_(gain)
