"""The critic that looks at patches. Shapes: B batch, H W pixels, h w patches."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from polysense.base.spec import Spec
from polysense.base.system import Part


class Critic(Part):
    """Judges pictures: high for real."""

    def looked_at(self, image: Tensor) -> Tensor:
        """The same verdicts, whose gradient reaches the picture but not the critic, and which leave its statistics alone."""
        return functional_call(self, {k: v.detach().clone() for k, v in self.state_dict().items()}, (image,))


class PatchCritic(Critic):
    """A convolutional network that judges every patch of a picture: [B,3,H,W] -> [B,1,h,w], high for real (Isola et al. 2017, section 3.2.2)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 64
        depth: int = 3                       # convolutions of stride 2
        channels: int = 3

    def __init__(self, c: Config):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(c.channels, c.width, 4, 2, 1), nn.LeakyReLU(0.2)]
        into = c.width
        for i in range(1, c.depth + 1):
            out = c.width * min(2 ** i, 8)
            layers += [nn.Conv2d(into, out, 4, 2 if i < c.depth else 1, 1, bias=False), nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]
            into = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(into, 1, 4, 1, 1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0.0, 0.02)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """What the critic minimises: verdicts on real patches above 1, on drawn ones below -1 (Lim & Ye 2017). Scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def balance(detail: Tensor, fooled: Tensor, last: Tensor, most: float = 1e4) -> Tensor:
    """How much the adversarial term counts: the ratio of both terms' gradients at the decoder's last layer (Esser et al. 2021, equation 7)."""
    a, b = (torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (detail, fooled))
    return (a / (b + 1e-4)).clamp(0.0, most).detach()
