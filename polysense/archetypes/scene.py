"""A scene that was learned from photographs and can be seen from anywhere. Abstract: a system adds its objective and is final."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.system import Spec, System
from polysense.decoders.render import Rendered, composed, finer, lengths, ndc, stratified, weights

CHUNK = 4096                                 # rays rendered at a time outside training


class Scene(System):
    """Radiance fields along rays: a coarse one at evenly spread samples, a fine one where the coarse one found something (Mildenhall et al.
    2020, section 5). `fine` None: the coarse one alone."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        coarse: Spec
        fine: Spec | None
        near: float = 2.0                    # distances along a ray between which something may be
        far: float = 6.0
        samples: int = 64
        more: int = 128                      # further samples for the fine field
        background: float | None = 1.0       # grey level behind everything; None: black
        noise: float = 0.0                   # deviation of noise on the density in training
        ndc: tuple[float, float] | None = None         # (2 f / W, 2 f / H) of forward-facing photographs
        fov: float = 0.6911112               # radians, of the width: how `Pipeline.render` looks at the scene
        distance: float = 4.0                # of that camera from the origin

    def __init__(self, c: Config):
        super().__init__()
        if not 0 <= c.near < c.far or c.samples < 3:
            raise UserError(f"near={c.near}, far={c.far}, samples={c.samples}", "0 <= near < far and at least three samples")
        self.coarse, self.fine = c.coarse.build(), c.fine.build() if c.fine is not None else None
        self.near, self.far, self.samples, self.more = c.near, c.far, c.samples, c.more
        self.background, self.noise, self.ndc, self.fov, self.distance = c.background, c.noise, c.ndc, c.fov, c.distance

    def render(self, origin: Tensor, direction: Tensor) -> tuple[Rendered, ...]:
        """origin, unit direction [R,3] -> what the coarse and the fine field show. In training samples are drawn by lot."""
        self._check(origin, direction)
        start, along = (origin, direction) if self.ndc is None else ndc(origin, direction, self.ndc)
        at = stratified(self.near, self.far, len(origin), self.samples, origin, self.training)
        first = self._shown(self.coarse, start, along, direction, at)
        if self.fine is None:
            return (first,)
        at = torch.cat([at, finer(at, first.weight.detach(), self.more, self.training)], 1).sort(1).values
        return first, self._shown(self.fine, start, along, direction, at)

    def render_view(self, origin: Tensor, direction: Tensor) -> Tensor:
        """origin, direction [R,3] -> colour [R,3] in [0,1]. Directions need not have unit length."""
        return self.view(origin, direction).colour

    def view(self, origin: Tensor, direction: Tensor) -> Rendered:
        """The finest answer for any number of rays, in parts that fit into memory."""
        self._check(origin, direction)
        direction = F.normalize(direction, dim=-1)
        parts = [self.render(o, d)[-1] for o, d in zip(origin.split(CHUNK), direction.split(CHUNK), strict=True)]
        return Rendered(*(torch.cat(p) for p in zip(*parts, strict=True)))

    def _shown(self, field: torch.nn.Module, start: Tensor, along: Tensor, direction: Tensor, at: Tensor) -> Rendered:
        density, colour = field(start[:, None] + at[..., None] * along[:, None], direction)
        if self.noise and self.training:
            density = density + self.noise * torch.randn_like(density)
        # in device coordinates directions have any length: a step of `at` is that much longer
        length = lengths(at) * (along.norm(dim=-1, keepdim=True) if self.ndc else 1.0)
        return composed(weights(density.float().relu(), length), colour.float(), at, self.background)

    def _check(self, origin: Tensor, direction: Tensor) -> None:
        for name, value in (("origin", origin), ("direction", direction)):
            if value.ndim != 2 or value.shape[1] != 3 or not value.is_floating_point() or value.shape != origin.shape or not len(value):
                raise UserError(f"{name} has shape {list(value.shape)} and type {value.dtype}", "rays are float [R,3], as many of each")
