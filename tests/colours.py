"""A system that needs no training: pictures and words become colours. What the pipeline's and the app's tests stand on."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from polysense.base.system import Feed, ImagePlan, Preset, Spec, System, TextPlan, final
from polysense.pipeline import Pipeline

RGB = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "cyan": (0, 255, 255), "magenta": (255, 0, 255),
       "black": (0, 0, 0), "white": (255, 255, 255), "grey": (128, 128, 128)}
WORDS = ["", *RGB]


def feature(rgb: Tensor) -> Tensor:
    """rgb [...,3] in 0..1 -> [...,4] of unit norm: chroma, a little brightness, and a bias that greyness turns to."""
    chroma = rgb - rgb.mean(-1, keepdim=True)
    return F.normalize(torch.cat([chroma, 0.2 * (rgb.mean(-1, keepdim=True) - 0.5) + 0.4], -1), dim=-1)


@final
class Colours(System):
    """The mean colour of a picture, of a patch, of the colour words of a text."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        grid: int = 4
        gain: float = 1.0

    def __init__(self, c: Config):
        super().__init__()
        self.grid, self.scale = c.grid, 20.0
        self.gain = torch.nn.Parameter(torch.tensor(c.gain))

    def encode_image(self, image: Tensor) -> Tensor:
        return feature(image.mean((2, 3)) * self.gain)

    def encode_text(self, text: Tensor) -> Tensor:
        table = torch.tensor([(128, 128, 128), *RGB.values()]) / 255
        said = (text > 0).unsqueeze(-1)
        colour = torch.where(said.any(1), (table[text] * said).sum(1) / said.sum(1).clamp(min=1), torch.full((3,), 0.5))
        return feature(colour)

    def encode_patches(self, image: Tensor) -> Tensor:
        return feature(F.adaptive_avg_pool2d(image, self.grid).permute(0, 2, 3, 1) * self.gain)

    def classify(self, image: Tensor) -> Tensor:
        return 20 * self.encode_image(image) @ self.encode_text(torch.arange(1, 4)[:, None]).T


@final
class Blind(System):
    """Reads text only."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 4

    def __init__(self, c: Config):
        super().__init__()
        self.table = torch.nn.Embedding(len(WORDS), c.width)

    def encode_text(self, text: Tensor) -> Tensor:
        return F.normalize(self.table(text).mean(1), dim=-1)


def tokenizer(texts: list[str]) -> Tensor:
    ids = [[WORDS.index(w) for w in t.lower().replace(".", "").split() if w in RGB] or [0] for t in texts]
    return torch.tensor([row + [0] * (max(map(len, ids)) - len(row)) for row in ids])


def preset(config: Spec, fit: str = "squash") -> Preset:
    image = ImagePlan(size=32, fit=fit, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return Preset(config=config, stages=(), data="", feed=Feed(image=image, text=TextPlan(vocab=len(WORDS), length=8)))


def pipeline(grid: int = 4, gain: float = 1.0, fit: str = "squash") -> Pipeline:
    plan = preset(Colours.Config(grid=grid, gain=gain), fit)
    return Pipeline(plan.config.build(), plan, tokenizer, id="colours", source="colours", device="cpu")


def paint(path: Path, colour: str | tuple[int, ...], size: tuple[int, int] = (24, 16), salt: int = 0) -> Path:
    """A plain picture; `salt` changes the bytes of the file and hardly the colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros((size[1], size[0], 3), np.uint8) + np.array(RGB[colour] if isinstance(colour, str) else colour, np.uint8)
    array[0, 0] = (salt % 256, salt // 256 % 256, 7)
    Image.fromarray(array).save(path)
    return path
