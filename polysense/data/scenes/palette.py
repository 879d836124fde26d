"""The words of the scenes: colours, backdrops, textures, sizes, numbers, and which colour x shape pairs training never sees."""
from functools import cache

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {                      # sRGB
    "red": (222, 38, 38), "green": (38, 158, 58), "blue": (38, 78, 222), "yellow": (247, 217, 38), "orange": (247, 132, 18),
    "purple": (138, 48, 182), "pink": (250, 138, 192), "cyan": (48, 208, 222), "brown": (122, 72, 34), "white": (250, 250, 250),
    "grey": (130, 130, 130), "black": (20, 20, 22)}
BACKDROPS: dict[str, tuple[int, int, int]] = {
    "white": (243, 243, 241), "light grey": (200, 202, 205), "dark grey": (70, 72, 76), "black": (22, 22, 26), "cream": (246, 232, 200),
    "pale blue": (186, 213, 240), "pale green": (190, 228, 192), "pale pink": (246, 206, 212), "dark blue": (22, 34, 84),
    "dark green": (16, 62, 36), "dark red": (88, 18, 24), "dark purple": (56, 24, 82)}
LIGHT_BACKDROPS = ("white", "light grey", "cream", "pale blue", "pale green", "pale pink")
BACKDROP_KINDS = {"plain": "plain", "gradient": "gradient", "noise": "cloudy", "stripes": "striped", "dots": "dotted", "checks": "checkered"}
TEXTURES = {"plain": "", "stripes": "striped", "dots": "dotted", "checks": "checkered", "gradient": "faded", "noise": "speckled"}
SIZES: dict[str, tuple[float, float]] = {"small": (0.085, 0.105), "medium": (0.14, 0.17), "large": (0.22, 0.26)}   # radius, picture = 1
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent", "hexagon", "arrow", "diamond", "ellipse",
          "pentagon", "semicircle", "trapezoid")
DIGITS = tuple(f"digit {word}" for word in NUMBERS[:10])
THINGS = SHAPES + DIGITS                                          # the classes of boxes and segments
_HOLD_SEED = 2


@cache
def heldout_pairs() -> frozenset[tuple[str, str]]:
    """The fixed fifth of all (colour, shape) pairs that never appears in training: 36 of 180, three shapes of every colour.

    A seeded Latin pattern, so that every colour and every shape is still seen in most of its pairs. Digits are never held out.
    """
    rng = np.random.Generator(np.random.Philox(key=_HOLD_SEED))
    shape_rank, colour_rank = rng.permutation(len(SHAPES)), rng.permutation(len(COLOURS))
    return frozenset((c, s) for j, c in enumerate(COLOURS) for i, s in enumerate(SHAPES) if (shape_rank[i] + 2 * colour_rank[j]) % 5 == 0)


def linear(rgb: tuple[int, int, int]) -> np.ndarray:
    """sRGB bytes -> linear light in [0, 1], float32 [3] (IEC 61966-2-1)."""
    x = np.asarray(rgb, np.float32) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4).astype(np.float32)


@cache
def _byte_table() -> np.ndarray:
    x = np.linspace(0, 1, 4096)
    return np.round(255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)).astype(np.uint8)


def to_bytes(light: np.ndarray) -> np.ndarray:
    """Linear light, any shape -> sRGB bytes (through a table of 4096 steps, exact to one byte)."""
    return _byte_table()[(np.clip(light, 0, 1) * 4095 + 0.5).astype(np.int32)]


def _oklab(rgb: tuple[int, int, int]) -> np.ndarray:
    lms = np.cbrt(np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]) @ linear(rgb))
    return np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]) @ lms


@cache
def contrast(colour: str, backdrop: str) -> float:
    """Perceptual distance of an object colour and a backdrop (Euclidean in Oklab, Ottosson 2020); below 0.19 they blend."""
    return float(np.linalg.norm(_oklab(COLOURS[colour]) - _oklab(BACKDROPS[backdrop])))


@cache
def contrast_of(one: str, other: str) -> float:
    """The same distance of two object colours."""
    return float(np.linalg.norm(_oklab(COLOURS[one]) - _oklab(COLOURS[other])))


@cache
def clear_on(backdrop: str) -> tuple[str, ...]:
    """The colours that stand out clearly on a backdrop."""
    return tuple(c for c in COLOURS if contrast(c, backdrop) >= 0.19)


@cache
def segment_palette() -> np.ndarray:
    """float32 [1 + len(THINGS), 3] in [0, 1]: black for the backdrop (row 0), then one colour per class, hues by the golden ratio."""
    hue = np.arange(len(THINGS)) * 0.61803398875 % 1 * 6
    value = 1 - 0.35 * (np.arange(len(THINGS)) % 3) / 2
    rgb = value[:, None] * np.clip(np.abs((hue[:, None] + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return np.concatenate([np.zeros((1, 3)), rgb]).astype(np.float32)
