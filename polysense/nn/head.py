"""What stands between a tower's pooled feature and the objective."""
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.norm import BatchNorm1d, LayerNorm


class Linear(Part, nn.Linear):
    """A projection without bias (CLIP's heads): x W^T, weight [out, into]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        out: int
        std: float | None = None             # None: into ** -0.5

    def __init__(self, c: Config):
        nn.Linear.__init__(self, c.into, c.out, bias=False)
        nn.init.normal_(self.weight, std=c.into ** -0.5 if c.std is None else c.std)


class LinearBias(Part, nn.Linear):
    """A dense layer. `std=0` starts it at exactly zero, as ViT's fine-tuning head (Dosovitskiy et al. 2021, section 3.2); the bias always is."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        out: int
        std: float = 0.01

    def __init__(self, c: Config):
        nn.Linear.__init__(self, c.into, c.out)
        nn.init.normal_(self.weight, std=c.std)
        nn.init.zeros_(self.bias)


class Nothing(Part):
    """The identity: a slot left empty."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        pass

    def __init__(self, c: Config):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


class Absent(Part):
    """A head that a published file does not have: whoever asks it gets an error that says so."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        says: str                            # what the model is instead, such as "answers questions"

    def __init__(self, c: Config):
        super().__init__()
        self.says = c.says

    def forward(self, *given: Tensor) -> Tensor:
        raise UserError(f"this model only {self.says}: the file it came from has no head for that", "take weights of the pre-trained model")


class TanhHead(Part):
    """out(tanh(pre(x))): ViT's pre-training head (Dosovitskiy et al. 2021, section 3.1), BERT's pooler with `out=0` (tanh(pre(x)) alone)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        hidden: int
        out: int = 0
        std: float = 0.02

    def __init__(self, c: Config):
        super().__init__()
        self.pre = nn.Linear(c.into, c.hidden)
        self.out = nn.Linear(c.hidden, c.out) if c.out else nn.Identity()
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=c.std)
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.pre(x)))


class NormLinear(Part):
    """A dense layer on a layer-normalised feature: BEiT's fine-tuning head, the norm behind the mean of the patches. Names: `norm`, `out`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        out: int
        eps: float = 1e-6
        std: float = 0.02

    def __init__(self, c: Config):
        super().__init__()
        self.norm, self.out = LayerNorm(LayerNorm.Config(width=c.into, eps=c.eps)), nn.Linear(c.into, c.out)
        nn.init.trunc_normal_(self.out.weight, std=c.std)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


class NormTanh(Part):
    """tanh(pre(norm(x))): BEiT-3's pooler of a first token."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        eps: float = 1e-5
        std: float = 0.02

    def __init__(self, c: Config):
        super().__init__()
        self.norm, self.pre = LayerNorm(LayerNorm.Config(width=c.into, eps=c.eps)), nn.Linear(c.into, c.into)
        nn.init.trunc_normal_(self.pre.weight, std=c.std)
        nn.init.zeros_(self.pre.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.pre(self.norm(x)))


class NormMLP(Part):
    """out(gelu(norm2(pre(norm1 x)))), both linears small at birth: BEiT-3's head for two pictures and a text."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        hidden: int
        out: int
        eps: float = 1e-5
        std: float = 2e-5

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.pre = LayerNorm(LayerNorm.Config(width=c.into, eps=c.eps)), nn.Linear(c.into, c.hidden)
        self.norm2, self.out = LayerNorm(LayerNorm.Config(width=c.hidden, eps=c.eps)), nn.Linear(c.hidden, c.out)
        for m in (self.pre, self.out):
            nn.init.trunc_normal_(m.weight, std=c.std)
            nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.gelu(self.norm2(self.pre(self.norm1(x)))))


class BatchLinear(Part):
    """A dense layer behind a batch norm without parameters, which brings the features of any encoder to one scale: MAE's linear probe (He et al.
    2022, appendix A.1). Names: `norm`, `out`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        out: int
        eps: float = 1e-6
        std: float = 0.01

    def __init__(self, c: Config):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(c.into, affine=False, eps=c.eps), nn.Linear(c.into, c.out)
        nn.init.trunc_normal_(self.out.weight, std=c.std)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


class Projector(Part):
    """Linear, batch norm, ReLU, ... , linear: [B, widths[0]] -> [B, widths[-1]].

    Every linear but the last is followed by batch norm and ReLU; SimCLR has two, SLIP three linears (Mu et al. 2022: 4096, 4096, 256).
    `last` says what the last linear has: a "bias" (SimCLR), "nothing" (MoCo v3's predictor of a ResNet), or no bias and behind it a batch "norm"
    without parameters (MoCo v3) or "scaled" with them (SimSiam). Names: `layers.{i}.linear`, `layers.{i}.norm`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        widths: tuple[int, ...]              # into, hidden..., out
        last: str = "bias"                   # or "nothing", "norm", "scaled"

    def __init__(self, c: Config):
        super().__init__()
        self.layers: Any = nn.ModuleList()
        for i, (a, b) in enumerate(zip(c.widths[:-1], c.widths[1:], strict=True)):
            last = i == len(c.widths) - 2
            layer = nn.Module()
            layer.linear = nn.Linear(a, b, bias=last and c.last == "bias")      # batch norm subtracts the mean: a bias before it is idle
            end = nn.BatchNorm1d(b, affine=c.last == "scaled") if c.last in ("norm", "scaled") else nn.Identity()
            layer.norm = end if last else BatchNorm1d(BatchNorm1d.Config(width=b))
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer.norm(layer.linear(x)).relu()
        return self.layers[-1].norm(self.layers[-1].linear(x))
