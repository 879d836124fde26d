"""Maps that a picture can be drawn along, taken from a photograph (Zhang et al. 2023, ControlNet, section 4).

All pictures are float [N,3,H,W] in [0,1]. Outlines, straight lines and strokes are computed here. Segments and depth come from whoever sees them
(`segment`, data with `depth`), as pictures of maps.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError

ANGLES, LINES = 180, 64                                 # of the votes; lines of a picture, at most


def edges(image: Tensor, low: float = 0.1, high: float = 0.2) -> Tensor:
    """Canny's outlines [N,1,H,W], 0 or 1 (Canny 1986): thin, and weak ones (from `low`) only where they go on from strong ones (from `high`)."""
    from kornia.filters import canny as outlined

    return outlined(image, low, high)[1]


def canny(image: Tensor) -> Tensor:
    """White outlines on black [N,3,H,W]."""
    return edges(image).expand(-1, 3, -1, -1)


def lines(image: Tensor) -> Tensor:
    """White straight lines on black [N,3,H,W]: those that many points of Canny's outlines vote for (Hough 1962; Duda & Hart 1972), drawn where the
    outline is."""
    return torch.stack([_drawn(e[0] > 0.5) for e in edges(image)])[:, None].expand(-1, 3, -1, -1)


def scribble(image: Tensor, least: float = 16 / 255) -> Tensor:
    """White strokes on black [N,3,H,W], as thick as a pen's: where a picture is darker in every channel than its neighbourhood, by `least`
    (Winnemöller, Kyprianidis & Olsen 2012, XDoG, as ControlNet's release has it: widths of 0.5 and 5 in a picture of 512)."""
    from kornia.filters import gaussian_blur2d

    wide = max(1.0, 5 * min(image.shape[-2:]) / 512)
    near, far = (gaussian_blur2d(image, (2 * (n := max(1, round(3 * s))) + 1, 2 * n + 1), (s, s), "replicate") for s in (0.5, wide))
    return ((far - near).amin(1, keepdim=True) > least).to(image.dtype).expand(-1, 3, -1, -1)


EXTRACTORS: dict[str, Callable[[Tensor], Tensor]] = {"canny": canny, "lines": lines, "scribble": scribble}


def extracted(name: str, image: Tensor) -> Tensor:
    """The map of that name [N,3,H,W]. UserError for another name."""
    if name not in EXTRACTORS:
        raise UserError(f"no map {name!r} can be taken from a picture", f"it is one of {', '.join(EXTRACTORS)}; other maps are given as pictures")
    return EXTRACTORS[name](image)


def _drawn(edge: Tensor) -> Tensor:
    """edge bool [H,W] -> its straight pieces, float [H,W]."""
    out, (h, w) = torch.zeros(edge.shape), edge.shape
    shortest = max(4.0, 0.15 * min(h, w))                                            # shorter ones are parts of curves
    place = edge.nonzero().float()                                                   # row, column
    angle = torch.arange(ANGLES) * torch.pi / ANGLES
    across = torch.stack([angle.sin(), angle.cos()])                                 # normals of the lines, row and column
    reach = int((h ** 2 + w ** 2) ** 0.5) + 2
    off = (place @ across).round().long() + reach                                    # [P,ANGLES] distance of the line through each point
    votes = torch.zeros(ANGLES, 2 * reach + 1)
    for a in range(ANGLES):
        votes[a] = torch.bincount(off[:, a], minlength=2 * reach + 1)
    peak = (votes == F.max_pool2d(votes[None], 9, 1, 4)[0]) & (votes >= shortest)
    for a, at in sorted(peak.nonzero().tolist(), key=lambda p: -float(votes[p[0], p[1]]))[:LINES]:
        near = place[((place @ across[:, a]) - (at - reach)).abs() <= 1.0]
        along = near @ torch.stack([across[1, a], -across[0, a]])
        order = along.argsort()
        near, along = near[order].long(), along[order]
        piece = F.pad((along.diff() > 3.0).long().cumsum(0), (1, 0))                 # a gap ends a piece
        for k in range(int(piece[-1]) + 1):
            some = piece == k
            if float(along[some][-1] - along[some][0]) >= shortest:
                out[near[some, 0], near[some, 1]] = 1.0
    return out
