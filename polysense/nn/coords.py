"""Numbers as tokens of one vocabulary (Pix2Seq), and polygons as masks."""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.nn.position import sincos

END, DETECT, SEGMENT, KEYPOINTS, CAPTION, FAKE, SEPARATOR, HIDDEN = 0, 10, 11, 12, 13, 30, 40, 41        # tokens that every vocabulary has


def quantise(value: Tensor, bins: int) -> Tensor:
    """value in [0,1] -> which of `bins` equal parts it lies in (Chen et al. 2022, Pix2Seq, section 2.1)."""
    return (value.clamp(0, 1) * bins).long().clamp(max=bins - 1)


def dequantise(token: Tensor, bins: int) -> Tensor:
    """The middle of a part: the inverse, wrong by at most 1 / (2 bins)."""
    return (token.float() + 0.5) / bins


@dataclass(frozen=True, kw_only=True)
class Vocabulary(Spec):
    """Where classes, coordinates and words begin, and what is written with them."""
    classes: tuple[str, ...]
    class_from: int = 100
    bins: int = 1000
    bins_from: int = 1000
    text_from: int = 3000
    words: int = 32_000

    @property
    def size(self) -> int:
        return self.text_from + self.words

    def check(self) -> None:
        """Raises UserError where ranges overlap."""
        if not HIDDEN < self.class_from <= self.class_from + len(self.classes) <= self.bins_from <= self.bins_from + self.bins <= self.text_from:
            raise UserError(f"the ranges from {self.class_from}, {self.bins_from} and {self.text_from} overlap",
                            "special tokens, classes, bins and words follow each other")

    @torch.no_grad()
    def order(self, table: Tensor) -> None:
        """Gives the rows [bins,D] of the bins in a table [size,D] sines and cosines of their number, of the table's own deviation: neighbours are
        born alike, so that short runs need not learn the order of numbers first. Not in the paper, whose runs are long."""
        rows = sincos(table.shape[1], torch.arange(self.bins, device="cpu"), base=2.0 * self.bins).to(table)
        table[self.bins_from:self.bins_from + self.bins] = rows * (2 ** 0.5 * table.std())

    def random_class(self, like: Tensor) -> Tensor:
        """What a decoder reads in place of classes, of the shape of `like`: any class, or "fake"."""
        kind = self.class_from + torch.randint(len(self.classes), like.shape, device=like.device)
        return torch.where(torch.rand(like.shape, device=like.device) < 0.5, kind, FAKE)

    def box_tokens(self, boxes: Tensor) -> Tensor:
        """boxes [...,4] (x0 y0 x1 y1) -> ymin xmin ymax xmax as tokens."""
        return self.bins_from + quantise(boxes[..., [1, 0, 3, 2]], self.bins)

    def boxes(self, tokens: Tensor) -> Tensor:
        """The inverse of `box_tokens`."""
        return dequantise(tokens - self.bins_from, self.bins)[..., [1, 0, 3, 2]]

    def prompt(self, task: int, boxes: Tensor, label: Tensor) -> Tensor:
        """What asks about one thing: task, box [O,4] and class [O] -> [O,6]."""
        head = torch.full((len(boxes), 1), task, device=boxes.device)
        return torch.cat([head, self.box_tokens(boxes), (self.class_from + label)[:, None]], 1)

    def place_tokens(self, place: Tensor) -> Tensor:
        """place [...,P,2] (x y) -> y x y x ... [...,2P]."""
        return (self.bins_from + quantise(place.flip(-1), self.bins)).flatten(-2)

    def places(self, tokens: Tensor) -> Tensor:
        """The inverse of `place_tokens`: [...,2P] -> [...,P,2]."""
        return dequantise((tokens - self.bins_from).clamp(min=0), self.bins).unflatten(-1, (-1, 2)).flip(-1)


def noise_boxes(boxes: Tensor, real: Tensor) -> Tensor:
    """boxes [B,M,4] of which `real` [B,M] -> as many noise boxes: moved copies of true ones (where there are any) or random ones, half each
    (Chen et al. 2022, Pix2Seq, section 2.4)."""
    b, m = real.shape
    corner = torch.rand(b, m, 4, device=boxes.device)
    random = torch.cat([torch.minimum(corner[..., :2], corner[..., 2:]), torch.maximum(corner[..., :2], corner[..., 2:])], -1)
    odds = real.float() + (~real.any(1, keepdim=True)).float()
    source = boxes.gather(1, torch.multinomial(odds, m, replacement=True)[..., None].expand(-1, -1, 4))
    side = (source[..., 2:] - source[..., :2]).repeat(1, 1, 2)
    moved = (source + side * (torch.rand_like(source) - 0.5)).clamp(0, 1)
    copy = (torch.rand(b, m, 1, device=boxes.device) < 0.5) & real.any(1)[:, None, None]
    return torch.where(copy, moved, random)


def filled(polygon: Tensor, h: int, w: int) -> Tensor:
    """polygon [...,P,2] (x y in [0,1], closed) -> bool [...,h,w]: the middles of places inside it, by the even-odd rule."""
    y = (torch.arange(h, device=polygon.device) + 0.5) / h
    x = (torch.arange(w, device=polygon.device) + 0.5) / w
    x0, y0 = polygon[..., 0], polygon[..., 1]
    x1, y1 = x0.roll(-1, -1), y0.roll(-1, -1)
    crosses = (y0[..., None] > y) != (y1[..., None] > y)                                             # [...,P,h]
    slope = (x1 - x0) / torch.where(y1 == y0, 1.0, y1 - y0)
    at = x0[..., None] + (y - y0[..., None]) * slope[..., None]                                      # where the edge meets the row
    left = crosses[..., None] & (at[..., None] > x)                                                  # [...,P,h,w]
    return left.sum(-3) % 2 == 1
