"""Random views of pictures, all of a batch at once.

Every random number is drawn for the *global* batch from (seed, step, view) before a rank takes its slice, so a view depends neither
on how many ranks or workers share the batch nor on what else is in it. Cropping and resizing is one antialiased filter per axis
and picture (Pillow's bicubic), applied as two batched matrix products; colours go through kornia's functional operators.

Steps and their order follow SimCLR (arXiv 2002.05709, appendix A): crop, flip, colour jitter, grey, blur; then solarize (BYOL, arXiv
2006.07733). Jitter factors and the ten tries for a crop are torchvision's.

Shapes: B pictures, C side of the square canvas they are laid in, S side of a view.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance import adjust_brightness_accumulative, adjust_hue, adjust_saturation_with_gray_subtraction, solarize
from torch import Tensor

from polysense.base.plan import AugmentPlan, SidesPlan, ViewPlan
from polysense.data.augment import augmented

TRIES = 10                                              # attempts at a crop that fits into the picture
COLUMNS = 2 * TRIES + 2 + 12                            # random numbers a view takes, whatever the plan switches on
SPREAD = (0.2175, 0.0188, 0.0045)                       # of the colours of ImageNet, values in [0, 1], along their principal components
AXES = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))     # the components, as columns


@dataclass(frozen=True)
class Draw:
    """The random numbers of one view of a (slice of a) batch: `u` uniform [B, COLUMNS]; `order` of the four jitter steps."""
    u: Tensor
    order: tuple[int, ...]

    def part(self, start: int, stop: int) -> Draw:
        return Draw(self.u[start:stop], self.order)


def draw(seed: int, step: int, view: int, batch: int) -> Draw:
    """The random numbers of view number `view` of a global batch of `batch` pictures."""
    a, b = (int(x) for x in np.random.SeedSequence([seed, step, view]).generate_state(2))
    g = torch.Generator().manual_seed(a << 31 ^ b)
    return Draw(torch.rand(batch, COLUMNS, generator=g), tuple(torch.randperm(4, generator=g).tolist()))


def working_side(plans: Sequence[ViewPlan]) -> int:
    """Shorter side, in pixels, at which pictures are kept for these views: enough that a crop of middling area loses nothing."""
    return max(max(p.size, p.sides[1]) if isinstance(p, SidesPlan)
               else math.ceil(p.size * min(2.0, 1.3 / math.sqrt(max(0.05, sum(p.scale) / 2)))) for p in plans)


def canvas_side(work: int) -> int:
    """Side of the square canvas that holds working pictures: up to 3:2 at full working size, longer ones are kept smaller."""
    return math.ceil(work * 1.5 / 8) * 8


def working_size(size: tuple[int, int], work: int) -> tuple[int, int]:
    """(width, height) at which a picture is kept: shorter side at most `work`, longer side inside the canvas, never enlarged."""
    w, h = size
    by = min(1.0, work / min(w, h), canvas_side(work) / max(w, h))
    return max(1, round(w * by)), max(1, round(h * by))


def crops(plan: ViewPlan, u: Tensor, sizes: Tensor) -> Tensor:
    """Random resized crops. u [B, 2 * TRIES + 2] uniform, sizes [B, 2] (width, height) -> x0 y0 x1 y1 in pixels [B, 4].

    The first of ten tries (area share uniform in `scale`, ratio log-uniform in `ratio`) that fits; else the largest central crop
    of an allowed ratio. As torchvision's RandomResizedCrop, without its rounding to whole pixels.
    """
    w, h = sizes.double().unbind(1)
    u = u.double()
    if isinstance(plan, SidesPlan):
        return _squares(plan, u, w, h)
    area = (plan.scale[0] + (plan.scale[1] - plan.scale[0]) * u[:, :TRIES]) * (w * h)[:, None]
    low, high = math.log(plan.ratio[0]), math.log(plan.ratio[1])
    ratio = torch.exp(low + (high - low) * u[:, TRIES:2 * TRIES])
    wide, tall = (area * ratio).sqrt(), (area / ratio).sqrt()
    fits = (wide <= w[:, None]) & (tall <= h[:, None])
    first = fits.int().argmax(1, keepdim=True)
    kept = (w / h).clamp(plan.ratio[0], plan.ratio[1])
    wide = torch.where(fits.any(1), wide.gather(1, first)[:, 0], torch.minimum(w, h * kept))
    tall = torch.where(fits.any(1), tall.gather(1, first)[:, 0], torch.minimum(h, w / kept))
    right, down = (torch.where(fits.any(1), v, 0.5) for v in u[:, 2 * TRIES:2 * TRIES + 2].unbind(1))
    x, y = (w - wide) * right, (h - tall) * down
    return torch.stack([x, y, x + wide, y + tall], 1)


def _squares(plan: SidesPlan, u: Tensor, w: Tensor, h: Tensor) -> Tensor:
    """A square anywhere, of the side that has `size` pixels when the shorter side has a length drawn from `sides`."""
    length = plan.sides[0] + (plan.sides[1] - plan.sides[0]) * u[:, 0]
    side = torch.minimum(w, h) * (plan.size / length).clamp(max=1.0)
    x, y = (w - side) * u[:, 2 * TRIES], (h - side) * u[:, 2 * TRIES + 1]
    return torch.stack([x, y, x + side, y + side], 1)


def flips(plan: ViewPlan, u: Tensor) -> Tensor:
    """Which pictures are mirrored, bool [B]."""
    return u[:, 2 * TRIES + 2] < plan.flip


def filters(start: Tensor, stop: Tensor, within: Tensor, size: int, canvas: int, mirror: Tensor | None = None) -> Tensor:
    """Resampling weights [B, size, canvas] from the interval [start, stop) pixels of a line of `within` pixels: rows sum to 1.

    Pillow's antialiased bicubic (a = -0.5), whose support grows with the scale, for any fractional interval.
    """
    scale = (stop - start) / size
    stretch = scale.clamp(min=1.0)[:, None, None]
    at = torch.arange(size, dtype=torch.float64) + 0.5
    centre = start[:, None] + scale[:, None] * at
    if mirror is not None:
        centre = torch.where(mirror[:, None], centre.flip(1), centre)
    place = torch.arange(canvas, dtype=torch.float32) + 0.5
    x = ((place - centre[..., None].float()) / stretch.float()).abs_()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weight = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros(())))
    weight.mul_(place < within[:, None, None])
    return weight / weight.sum(-1, keepdim=True)


def lay(pictures: Sequence[np.ndarray], canvas: int) -> tuple[Tensor, Tensor]:
    """Arrays [h,w,K], uint8 or float in [0,1] -> (float [B,C,C,K] in [0,1], each in its upper left corner; sizes int [B,2], width and height)."""
    out = np.zeros((len(pictures), canvas, canvas, pictures[0].shape[-1]), pictures[0].dtype)
    for place, picture in zip(out, pictures):
        place[:picture.shape[0], :picture.shape[1]] = picture
    laid = torch.from_numpy(out)
    sizes = torch.tensor([(p.shape[1], p.shape[0]) for p in pictures], dtype=torch.int64)
    return laid.to(torch.float32).div_(255) if laid.dtype == torch.uint8 else laid, sizes


def cut(canvas: Tensor, boxes: Tensor, sizes: Tensor, size: int, mirror: Tensor) -> Tensor:
    """The boxes [B,4] (pixels) of canvases [B,C,C,K], resized to `size`, mirrored where told -> [B,K,S,S]."""
    b, c, _, k = canvas.shape
    x0, y0, x1, y1 = boxes.unbind(1)
    down = filters(y0, y1, sizes[:, 1], size, c)
    across = filters(x0, x1, sizes[:, 0], size, c, mirror)
    rows = torch.bmm(down, canvas.reshape(b, c, c * k)).view(b, size, c, k)
    return torch.bmm(rows.permute(0, 3, 1, 2).reshape(b, k * size, c), across.transpose(1, 2)).view(b, k, size, size)


def moving(plan: ViewPlan, drawn: Draw, films: Sequence[np.ndarray]) -> Tensor:
    """One random crop and mirror for all frames of a film: films [T,h,w,3] uint8 each -> the frames of all of them [N,3,S,S] in [0,1]."""
    canvas, sizes = lay([frame for film in films for frame in film], max(max(film.shape[1:3]) for film in films))
    many = torch.tensor([len(film) for film in films])
    boxes = crops(plan, drawn.u, sizes[many.cumsum(0) - many]).repeat_interleave(many, 0)
    return cut(canvas, boxes, sizes, plan.size, flips(plan, drawn.u).repeat_interleave(many)).clamp_(0, 1)


def colours(plan: ViewPlan, drawn: Draw, image: Tensor) -> Tensor:
    """Jitter, grey, blur, solarize and lighting, each on the pictures that the draw chose. image [B,3,S,S] in [0,1] -> the same."""
    u = drawn.u[:, 2 * TRIES + 3:]
    if plan.jitter > 0:
        image = _some(u[:, 0] < plan.jitter, image, lambda x, v: _jitter(plan, v, drawn.order, x), u[:, 1:5])
    if plan.grey > 0:
        image = _some(u[:, 5] < plan.grey, image, lambda x, v: rgb_to_grayscale(x).expand_as(x))
    if plan.blur > 0:
        low, high = plan.blur_sigma
        image = _some(u[:, 6] < plan.blur, image, lambda x, v: blur(x, low + (high - low) * v[:, 0]), u[:, 7:8])
    if plan.solarize > 0:
        image = _some(u[:, 8] < plan.solarize, image, lambda x, v: solarize(x, 0.5))
    if isinstance(plan, AugmentPlan):
        image = augmented(plan, u[:, 9:11], image)
    if isinstance(plan, SidesPlan) and plan.lighting > 0:
        image = image + _lighting(plan.lighting, u[:, 9:11])[:, :, None, None]
    return image


def _lighting(amount: float, u: Tensor) -> Tensor:
    """Colour noise [B,3]: sum_k p_k a_k s_k over the principal components, a_k ~ N(0, amount), one draw a picture (Krizhevsky et al. 2012, 4.1).
    u [B,2] uniform; the third number is made of the low bits of the first."""
    three = torch.cat([u, (u[:, :1] * 4096) % 1], 1).clamp(1e-4, 1 - 1e-4)
    normal = math.sqrt(2) * torch.erfinv(2 * three - 1) * amount
    return (normal * torch.tensor(SPREAD)) @ torch.tensor(AXES).T


def _some(chosen: Tensor, image: Tensor, change, numbers: Tensor | None = None) -> Tensor:
    rows = chosen.nonzero()[:, 0]
    if not len(rows):
        return image
    return image.index_copy(0, rows, change(image[rows], image if numbers is None else numbers[rows]))


def _jitter(plan: ViewPlan, u: Tensor, order: tuple[int, ...], x: Tensor) -> Tensor:
    brightness, contrast, saturation, hue = plan.jitter_by
    by = [1 + (2 * u[:, k] - 1) * amount for k, amount in enumerate((brightness, contrast, saturation))]
    for k in order:
        if k == 0 and brightness:
            x = adjust_brightness_accumulative(x, by[0].clamp(min=0))
        elif k == 1 and contrast:
            # torchvision's contrast, about the mean grey; the mean in double, so that its rounding does not depend on the batch.
            mean = rgb_to_grayscale(x).double().mean((1, 2, 3), keepdim=True).float()
            x = torch.lerp(mean.expand_as(x), x, by[1].clamp(min=0).view(-1, 1, 1, 1)).clamp(0, 1)
        elif k == 2 and saturation:
            x = adjust_saturation_with_gray_subtraction(x, by[2].clamp(min=0)).clamp(0, 1)
        elif k == 3 and hue:
            x = adjust_hue(x, (2 * u[:, 3] - 1) * (2 * math.pi * hue))
    return x


def blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with one sigma [B] (pixels) a picture, edges reflected weights renormalised. image [B,C,S,S] -> the same."""
    size = image.shape[-1]
    place = torch.arange(size, dtype=torch.float32)
    weight = torch.exp(-0.5 * ((place[:, None] - place) / sigma.clamp(min=1e-3)[:, None, None]) ** 2)
    weight = weight / weight.sum(-1, keepdim=True)
    b, c = image.shape[:2]
    rows = torch.bmm(image.reshape(b, c * size, size), weight.transpose(1, 2)).view(b, c, size, size)
    return torch.matmul(weight[:, None], rows)


def view(plan: ViewPlan, drawn: Draw, canvas: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One view of canvases [B,C,C,3] -> (image [B,3,S,S] in [0,1], its boxes in pixels [B,4], mirrored bool [B])."""
    boxes, mirror = crops(plan, drawn.u[:, :2 * TRIES + 2], sizes), flips(plan, drawn.u)
    image = cut(canvas, boxes, sizes, plan.size, mirror).clamp_(0, 1)
    return colours(plan, drawn, image), boxes, mirror
