"""What DINOv2's vision transformers have beyond the plain one. Shapes: B batch, T tokens, R registers, D width."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.nn.block import PreNorm
from polysense.nn.drop import added
from polysense.nn.transformer import Transformer
from polysense.towers.vit import ViT

FILTERS = ("plain", "antialias")


class RegisteredBody(Transformer):
    """A transformer with R more learned tokens in it, `registers [1,R,D]`, without positions, which nobody outside sees (Darcet et al. 2024): they
    take up what the network would otherwise keep in the patches of empty background. They stand behind the others; attention knows no order."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Transformer.Config):
        registers: int = 4

    def __init__(self, c: Config):
        super().__init__(c)
        if c.registers < 1:
            raise UserError(f"{c.registers} registers", "one at least; without any, take a Transformer")
        self.registers = nn.Parameter(torch.randn(1, c.registers, c.width) * 1e-6)

    def layers(self, x: Tensor, source: Tensor | None = None, *, start: int = 0, **how: object) -> list[Tensor]:
        """As Transformer.layers, of the tokens outside alone. UserError for a start in the middle, where the registers would be lost."""
        if start or how.get("mask") is not None or how.get("causal"):
            raise UserError("a body with registers runs from its first block, over whole pictures", "leave start, mask and causal out")
        inside = torch.cat([x, self.registers.expand(len(x), -1, -1).to(x.dtype)], 1)
        return [y[:, :x.shape[1]] for y in super().layers(inside, source, **how)]  # type: ignore[arg-type]

    def _at(self, x: Tensor, at: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        return self(x, mask=mask, causal=causal)[torch.arange(len(x), device=x.device), at][:, None]


class ResizedViT(ViT):
    """A ViT that says how its positions are interpolated for other sizes: "plain" bicubic, or antialiased; to a grid that is `offset` patches larger
    than it is (0.1 in the code that DINOv2's first weights were released with)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ViT.Config):
        resize: str = "plain"
        offset: float = 0.0

    def __init__(self, c: Config):
        super().__init__(c)
        if c.resize not in FILTERS:
            raise UserError(f"no resize={c.resize!r}", f"it is one of {', '.join(FILTERS)}")
        self.resize, self.offset = c.resize, c.offset

    def positions(self, position: Tensor, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return position
        first, patches = position[:, :self.prefix], position[:, self.prefix:]
        image = patches.float().unflatten(1, self.grid).permute(0, 3, 1, 2)
        by = [(n + self.offset) / had for n, had in zip(grid, self.grid, strict=True)]
        to: dict[str, object] = {"scale_factor": by} if self.offset else {"size": grid}
        image = F.interpolate(image, mode="bicubic", antialias=self.resize == "antialias", **to)  # type: ignore[arg-type]
        return torch.cat([first, image.flatten(2).transpose(1, 2).to(position.dtype)], 1)


class SkippingBlock(PreNorm):
    """A pre-norm block whose stochastic depth computes each branch for the samples that keep it, and for no others (Oquab et al. 2024, section 5)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PreNorm.Config):
        pass

    def forward(self, x: Tensor, source: Tensor | None = None, **how: object) -> Tensor:  # type: ignore[override]
        """As PreNorm.forward; in training int(B (1 - rate)) samples, one at least, pass each branch, scaled by B over their number."""
        if not self.training or not self.drop_path or how.get("query") is not None:
            return super().forward(x, source, **how)  # type: ignore[arg-type]
        x = self._some(x, lambda part: self.attn(self.norm1(part)), self.scale1)
        return self._some(x, lambda part: self.mlp(self.norm2(part)), self.scale2)

    def _some(self, x: Tensor, branch: object, scale: Tensor | None) -> Tensor:
        kept = max(1, int(len(x) * (1 - self.drop_path)))
        rows = torch.randperm(len(x), device=x.device)[:kept]
        y = branch(x[rows])  # type: ignore[operator]
        return added(x, rows, y if scale is None else y * scale, len(x) / kept)
