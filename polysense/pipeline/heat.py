"""What a pipeline answers with besides numbers: ranked labels, boxes, and heat-maps that show which part of a picture a word matched.

Heat-maps follow the patch-text similarity that contrastive towers give for free (Zhou et al., Extract Free Dense Labels from CLIP, ECCV 2022):
the cosine between every patch feature and a word, less the same cosine averaged over texts that say nothing (so that a patch that
resembles any text is not mistaken for evidence), stretched to 0..1 over the picture.
"""
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray

# Words that no region of a picture can answer for. Kept short on purpose: a word too many costs one more heat-map, a word too few loses one.
STOP = frozenset(re.findall(r"\w+", """a an the of on in at to by with and or is are was were be it its this that these those some there for from as
    into near over under his her their picture photo photograph image showing shows"""))
NEUTRAL = ("", "a photo", "an image of something", "a picture of a thing")


@dataclass(frozen=True)
class Labelled:
    """Labels of one picture, most probable first."""
    path: str
    labels: tuple[tuple[str, float], ...]

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "labels": [{"label": name, "probability": p} for name, p in self.labels]}


@dataclass(frozen=True)
class Detection:
    """One thing found in a picture: `box` is x0 y0 x1 y1 in [0, 1], `score` a probability, `points` x y of its parts (None: hidden), where
    they were asked for."""
    label: str
    score: float
    box: tuple[float, float, float, float]
    points: tuple[tuple[float, float] | None, ...] = ()

    def to_json(self) -> dict[str, Any]:
        points = {"points": [p and list(p) for p in self.points]} if self.points else {}
        return {"label": self.label, "score": self.score, "box": list(self.box), **points}


@dataclass(frozen=True)
class Heat:
    """Where one word matches: `map` [H,W] float32 in 0..1 over `Explanation.image`; `score` is how much better the word fits the whole
    picture than a text that says nothing (a difference of cosines); `share` the part of the patches that it explains better than any other word
    and any empty text; `patches` [h,w] are the unstretched differences patch by patch."""
    word: str
    score: float
    share: float
    map: Array
    patches: Array

    @property
    def peak(self) -> tuple[float, float]:
        """Centre x, y in [0, 1] of the hottest place."""
        y, x = np.unravel_index(int(self.map.argmax()), self.map.shape)
        return (float(x) + 0.5) / self.map.shape[1], (float(y) + 0.5) / self.map.shape[0]

    def to_json(self) -> dict[str, Any]:
        return {"word": self.word, "score": self.score, "share": self.share, "peak": list(self.peak)}


@dataclass(frozen=True)
class Explanation:
    """Why a text fits a picture: the heat of the whole text, then of each word that matched, best first. `image` is a thumbnail."""
    text: str
    image: Image.Image
    whole: Heat
    words: tuple[Heat, ...]

    def overlay(self, word: str | None = None, strength: float = 0.55) -> Image.Image:
        """The thumbnail under the heat of `word` (None: of the whole text)."""
        chosen = self.whole if word is None else next(h for h in self.words if h.word == word)
        return overlay(self.image, chosen.map, strength)

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "whole": self.whole.to_json(), "words": [h.to_json() for h in self.words]}


def overlay(image: Image.Image, heat: Array, strength: float = 0.55) -> Image.Image:
    """`heat` [h,w] in 0..1 drawn over a picture of any size: cold places stay grey and dim, hot places glow in colour."""
    from matplotlib import colormaps

    picture = image.convert("RGB")
    warm = np.asarray(Image.fromarray(np.asarray(heat, np.float32)).resize(picture.size, Image.Resampling.BILINEAR)).clip(0, 1)
    grey = np.asarray(picture.convert("L").convert("RGB"), np.float32)
    base = grey + (np.asarray(picture, np.float32) - grey) * warm[..., None]
    colour = colormaps["inferno"](warm)[..., :3].astype(np.float32) * 255
    mix = strength * warm[..., None]
    return Image.fromarray((base * (0.55 + 0.45 * warm[..., None]) * (1 - mix) + colour * mix).clip(0, 255).astype(np.uint8))


def content_words(text: str) -> list[str]:
    """The words of a text that a picture can show, in order, once each; numbers and words of any script count."""
    words = [w.lower() for w in re.findall(r"[^\W_]+(?:[-'’][^\W_]+)*", text)]
    return list(dict.fromkeys(w for w in words if w not in STOP))


def heat_maps(patches: Array, image: Array, texts: list[str], features: Array, neutral: Array, thumbnail: Image.Image,
              seen: tuple[float, float, float, float]) -> list[Heat]:
    """One Heat a text. patches [h,w,D], image [D], features [N,D] and neutral [M,D] have unit norm; `seen` is the part of the picture
    (x0 y0 x1 y1 in [0, 1]) that the patches cover: outside it the map is 0, as nothing was looked at."""
    contrast = features - neutral.mean(0)
    scores, raw = contrast @ image, np.einsum("hwd,nd->nhw", patches, contrast).astype(np.float32)
    low, high = raw.min((1, 2), keepdims=True), raw.max((1, 2), keepdims=True)
    flat = (raw - low) / np.maximum(high - low, 1e-6)
    # as in zero-shot segmentation: each patch goes to the text that fits it best; the first text is the whole query, which competes with no word
    rivals = np.concatenate([np.einsum("hwd,md->mhw", patches, neutral - neutral.mean(0)).max(0, keepdims=True), raw[1:]])
    share = [1.0, *((rivals.argmax(0) == i + 1).mean() for i in range(len(texts) - 1))]
    maps = [placed(small, thumbnail.size, seen) for small in flat]
    return [Heat(t, float(s), float(p), m, r) for t, s, p, m, r in zip(texts, scores, share, maps, raw, strict=True)]


def placed(small: Array, size: tuple[int, int], seen: tuple[float, float, float, float]) -> Array:
    """A map [h,w] in 0..1 of the part `seen` (x0 y0 x1 y1, in [0, 1] or, where it was padded, beyond) of a picture of (width, height) `size`
    -> [height,width], 0 outside that part."""
    w, h = size
    x0, y0, x1, y1 = (round(v * s) for v, s in zip(seen, (w, h, w, h), strict=True))
    large = np.asarray(Image.fromarray(np.asarray(small, np.float32)).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)).clip(0, 1)
    out = np.zeros((h, w), np.float32)
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, w), min(y1, h)
    out[top:bottom, left:right] = large[top - y0:bottom - y0, left - x0:right - x0]
    return out
