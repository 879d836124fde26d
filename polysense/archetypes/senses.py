"""Several senses in one space beside a text tower: ImageBind binds them through pictures, LanguageBind through language."""
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import log
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.system import Batch, Part, Spec, System
from polysense.mechanisms.lora import LowRank
from polysense.mechanisms.mask_sampler import RandomMask
from polysense.nn.head import Linear
from polysense.nn.norm import LayerNorm
from polysense.nn.tokens import PlaneTokens
from polysense.nn.transformer import Transformer
from polysense.towers.modal import ModalViT

SHAPES = {"image": "B 3 H W", "video": "B T 3 H W", "audio": "B S", "depth": "B C H W", "thermal": "B C H W", "imu": "B 6 S"}


class Bound(Part):
    """One modality: its tower, a linear head, dropout before it, and the fixed factor that its unit vectors leave with."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        tower: ModalViT.Config
        head: Spec
        scale: float
        dropout: float = 0.0

    def __init__(self, c: Config):
        super().__init__()
        self.tower, self.head, self.dropout = c.tower.build(), c.head.build(), c.dropout
        self.log_scale: Tensor
        self.register_buffer("log_scale", torch.tensor(log(c.scale)))

    def forward(self, given: Tensor) -> Tensor:
        """-> [B,D], unit norm."""
        return F.normalize(self.head(F.dropout(self.tower.pooled(given), self.dropout, self.training)).float(), dim=-1)


class Sense(Part):
    """One modality: its tower with its updates, a linear head, a temperature of its own, and how many of its patches are hidden in training."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        tower: Spec
        head: Spec
        sampler: RandomMask.Config = field(default_factory=lambda: RandomMask.Config(ratio=0.0))
        adapter: LowRank | None = None       # on the tower; None: no updates
        scale: float = 1 / 0.07

    def __init__(self, c: Config):
        super().__init__()
        self.tower, self.head, self.sampler = c.tower.build(), c.head.build(), c.sampler.build()
        self.log_scale = nn.Parameter(torch.tensor(log(c.scale)))
        if c.adapter is not None:
            c.adapter.put(self.tower)

    @property
    def scale(self) -> Tensor:
        """exp(log_scale), at most 100; the clamp passes gradient at the bound."""
        return self.log_scale.clamp(max=log(100.0)).exp()

    def forward(self, given: Tensor) -> Tensor:
        """-> [B,D], unit norm, of everything."""
        return F.normalize(self.head(self.pooled(given, None)).float(), dim=-1)

    def part(self, given: Tensor) -> Tensor:
        """The same of the patches that the sampler leaves."""
        grid = self.tower.grid_of(given.flatten(0, given.ndim - 4) if given.ndim > 4 else given)
        keep = self.sampler(len(given), grid, given.device).keep if self.sampler.ratio else None
        return F.normalize(self.head(self.pooled(given, keep)).float(), dim=-1)

    def pooled(self, given: Tensor, keep: Tensor | None) -> Tensor:
        """[B,W], below the head. Frames of clips [B,T,...] see the same places, and are averaged."""
        if given.ndim < 5:
            return self.tower(given, keep=keep, short=True).pooled
        frames = self.tower(given.flatten(0, 1), keep=None if keep is None else keep.repeat_interleave(given.shape[1], 0), short=True).pooled
        return frames.unflatten(0, given.shape[:2]).mean(1)


class SenseSpace(System):
    """A text tower with its head and, under its name, the tower of each sense or None. Abstract: a system builds them and adds its objective."""
    SENSES: ClassVar[tuple[str, ...]]
    text: Any
    text_head: Any

    def sense(self, name: str) -> Any:
        """The tower of a modality. UserError where this configuration has none."""
        found = getattr(self, name) if name in self.SENSES else None
        if found is None:
            able = [s for s in self.SENSES if getattr(self, s) is not None]
            raise UserError(f"this {type(self).__name__} has no tower for {name}", f"it has one for {', '.join(able) or 'nothing'}")
        return found

    def checked(self, name: str, given: Tensor) -> Tensor:
        """given, or UserError for another number of axes than the modality has."""
        if given.ndim != len(SHAPES[name].split()) or not given.shape[1]:
            raise UserError(f"{name} of shape {list(given.shape)}", f"it should be [{SHAPES[name]}], nothing of it empty")
        return given

    def encode_text(self, text: Tensor) -> Tensor:
        """text [B,L] token ids -> [B,D], unit norm."""
        return F.normalize(self.text_head(self.text.pooled(text)).float(), dim=-1)

    def encode_depth(self, depth: Tensor) -> Tensor:
        """depth [B,1,H,W] -> [B,D], unit norm."""
        return self.sense("depth")(self.checked("depth", depth))

    def encode_thermal(self, thermal: Tensor) -> Tensor:
        """thermal [B,1,H,W] -> [B,D], unit norm."""
        return self.sense("thermal")(self.checked("thermal", thermal))

    @torch.no_grad()
    def doubts(self, batch: Batch) -> Iterator[str]:
        """Texts that differ and are one point all the same."""
        said = self.eval().encode_text(batch["text"]) if "text" in batch else torch.zeros(0)
        if len(said) and bool((batch["text"] != batch["text"][:1]).any()) and float((said - said[:1]).abs().max()) < 1e-6:
            yield "every text of a batch has the same feature: does the tower pool the right token?"


def sense(tower: Any, dim: int, *, rank: int = 0, alpha: float = 16.0, ratio: float = 0.0, on: str = "*.attn.q|k|v|out") -> Sense.Config:
    """rank=0: no updates."""
    return Sense.Config(tower=tower, head=Linear.Config(into=tower.width, out=dim), sampler=RandomMask.Config(ratio=ratio),
                        adapter=LowRank(rank=rank, alpha=alpha, on=on) if rank else None)


def plane(of: Transformer.Config, size: tuple[int, int], patch: int, front: Spec) -> ModalViT.Config:
    """CLIP's image tower over a plane of `size` that `front` makes of the modality."""
    return ModalViT.Config(front=front, body=of, norm_pre=LayerNorm.Config(), tokens=PlaneTokens.Config(
        size=size, kernel=patch, stride=patch, channels=3))
