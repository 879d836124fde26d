"""A scene as a function: place and direction -> density and colour."""
from dataclasses import dataclass, field
from math import pi
from typing import Any

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part


class Waves(Part):
    """gamma(p) = (sin(2^0 u p), cos(2^0 u p), ..., sin(2^(L-1) u p), cos(2^(L-1) u p)), u being pi in the paper (Mildenhall et al. 2020,
    equation 4) and 1 in the released code, which also puts p itself in front. [...,3] -> [...,width]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        levels: int
        unit: str = "one"                    # "one" (released code) or "pi" (paper)
        first: str = "place"                 # what stands in front: "place" (released code) or "" (paper)

    def __init__(self, c: Config):
        super().__init__()
        if c.unit not in ("one", "pi") or c.first not in ("place", "") or (not c.levels and not c.first):
            raise UserError(f"unit={c.unit!r}, first={c.first!r}, levels={c.levels} make no code", "unit is one or pi, first is place or empty")
        self.levels, self.unit, self.first = c.levels, pi if c.unit == "pi" else 1.0, c.first
        self.width = 6 * c.levels + (3 if c.first else 0)

    def forward(self, p: Tensor) -> Tensor:
        angle = p[..., None, :] * (self.unit * 2.0 ** torch.arange(self.levels, device=p.device))[:, None]
        waves = torch.stack([angle.sin(), angle.cos()], -2).flatten(-3)
        return torch.cat([p, waves], -1) if self.first else waves


class Radiance(Part):
    """Mildenhall et al. 2020, figure 7: `depth` ReLU layers read the coded place (again before layer `skip`); density comes from them alone; one
    linear makes a feature, which half a layer turns into colour together with the coded direction. That the direction enters this late is
    what keeps the density honest; `view="early"`, for comparison, lets it in at the first layer."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 256
        depth: int = 8
        skip: int = 5                        # number of the layer (from 0) that reads the place again; 0: none does
        place: Waves.Config = field(default_factory=lambda: Waves.Config(levels=10))
        direction: Waves.Config = field(default_factory=lambda: Waves.Config(levels=4))
        view: str = "late"

    def __init__(self, c: Config):
        super().__init__()
        if c.view not in ("late", "early") or not 0 <= c.skip < c.depth:
            raise UserError(f"view={c.view!r} or skip={c.skip} with depth={c.depth}", "view is late or early, skip a layer's number")
        self.place, self.direction, self.skip, self.view = c.place.build(), c.direction.build(), c.skip, c.view
        early = self.direction.width if c.view == "early" else 0
        into = self.place.width + early
        self.layers: Any = nn.ModuleList(nn.Linear(into if not i else c.width + (into if i == c.skip else 0), c.width) for i in range(c.depth))
        self.feature, self.density = nn.Linear(c.width, c.width), nn.Linear(c.width, 1)
        self.late, self.colour = nn.Linear(c.width + (0 if early else self.direction.width), c.width // 2), nn.Linear(c.width // 2, 3)
        nn.init.constant_(self.density.bias, 0.1)              # a ReLU that starts below zero everywhere never learns

    def forward(self, place: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """place [R,S,3], unit direction [R,3] -> density before its ReLU [R,S] and colour [R,S,3] in [0,1]."""
        towards = self.direction(direction)[:, None].expand(*place.shape[:2], -1)
        code = self.place(place)
        code = torch.cat([code, towards], -1) if self.view == "early" else code
        x = code
        for i, layer in enumerate(self.layers):
            x = layer(torch.cat([code, x], -1) if i and i == self.skip else x).relu()
        y = self.feature(x) if self.view == "early" else torch.cat([self.feature(x), towards], -1)
        return self.density(x)[..., 0], self.colour(self.late(y).relu()).sigmoid()
