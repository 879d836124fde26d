"""How far apart two pictures look to a network. Shapes: B batch, H W pixels, C channels and h w places of one of its maps."""
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.check import check_image
from polysense.towers.convnet import ConvNet, PlainInit, Pool, Row

SHIFT, SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)           # of ImageNet's colours in [-1,1]


def vgg_rows(convs: tuple[int, ...] = (2, 2, 3, 3, 3), base: int = 64) -> tuple[Row.Config, ...]:
    """The convolutions of a VGG; 64 and the default are VGG-16's. No pool behind the last one, whose map is compared as it is."""
    return tuple(Row.Config(out=base * min(2 ** s, 8), pool=Pool.Config() if k == n - 1 and s < len(convs) - 1 else None)
                 for s, n in enumerate(convs) for k in range(n))


class Perceptual(Part):
    """d(x, y) = sum over maps l of the mean over places of |sqrt(w_l) * (f_l(x) - f_l(y))|^2, f of unit length over channels (LPIPS, Zhang et al.
    2018, equation 1). Never trained here.

    Names: `tower` (a ConvNet without dense layers) and `weigh.{l}` [C], the learned weight of each channel. They begin as 1, the paper's distance
    without them; a Start from a VGG lends the tower, `weights.lpips` reads files of both.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        rows: tuple[Row.Config, ...] = field(default_factory=vgg_rows)
        seen: tuple[int, ...] = (1, 3, 6, 9, 12)                   # the convolutions whose maps are compared
        init: Spec = field(default_factory=lambda: PlainInit.Config(std=None))

    shift: Tensor
    spread: Tensor

    def __init__(self, c: Config):
        super().__init__()
        if not c.seen or any(not 0 <= i < len(c.rows) for i in c.seen):
            raise UserError(f"seen={c.seen}", f"the network has the maps 0 to {len(c.rows) - 1}")
        self.tower = ConvNet(ConvNet.Config(rows=c.rows, grid=1, hidden=(), init=c.init))
        self.weigh = nn.ParameterList(torch.ones(c.rows[i].out) for i in c.seen)
        self.seen = c.seen
        for name, value in (("shift", SHIFT), ("spread", SPREAD)):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def maps(self, image: Tensor) -> list[Tensor]:
        """image [B,3,H,W] in [-1,1] -> the compared maps [B,C,h,w], of unit length at every place. Raises UserError for one too small."""
        check_image(image, 3)
        found = self.tower.features((image - self.shift) / self.spread)
        return [found[i] / (found[i].norm(dim=1, keepdim=True) + 1e-10) for i in self.seen]

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        """Pictures [B,3,H,W] in [-1,1], twice -> distances [B]. A gradient reaches both, and no weight of this network."""
        pairs = zip(self.maps(one), self.maps(two), self.weigh, strict=True)
        return torch.stack([((a - b).square() * w.view(1, -1, 1, 1)).sum(1).mean((1, 2)) for a, b, w in pairs]).sum(0)

    def take_over(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The convolutions of a trained VGG (`stages.*`); its dense layers have no use here."""
        if any(k.startswith("tower.") for k in weights):
            return weights
        return self.state_dict() | {f"tower.{k}": v for k, v in weights.items() if k.startswith("stages.")}
