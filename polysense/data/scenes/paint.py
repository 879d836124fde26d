"""From a scene to a picture at any size: analytic coverage of signed distances, composited in linear light, one window a thing."""
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from polysense.data.scenes.palette import BACKDROPS, COLOURS, LIGHT_BACKDROPS, THINGS, linear, segment_palette, to_bytes
from polysense.data.scenes.shapes import REACH, field
from polysense.data.scenes.world import Backdrop, Scene, Thing, local

Window = tuple[slice, slice]


def cover(distance: np.ndarray, soft: float = 0.75) -> np.ndarray:
    """Share of a pixel inside a shape, from the signed distance of its centre in pixels: a smoothstep `2 * soft` pixels wide."""
    t = np.clip(0.5 - distance / (2 * soft), 0, 1)
    return t * t * (3 - 2 * t)


@lru_cache(maxsize=16)
def _centres(size: int) -> np.ndarray:
    return ((np.arange(size) + 0.5) / size).astype(np.float32)


@lru_cache(maxsize=64)
def _bilinear(size: int, knots: int) -> np.ndarray:
    """[size, knots] weights of a smooth interpolation between knots that span the picture."""
    at = _centres(size) * (knots - 1)
    low = np.minimum(at.astype(np.int32), knots - 2)
    t = at - low
    t, out = t * t * (3 - 2 * t), np.zeros((size, knots), np.float32)
    out[np.arange(size), low], out[np.arange(size), low + 1] = 1 - t, t
    return out


def pattern(kind: str, x: np.ndarray, y: np.ndarray, pitch: float, unit: float, seed: int) -> np.ndarray:
    """Where the second colour goes, in [0, 1]. `x y` in radii, `pitch` the period in radii, `unit` pixels in a radius."""
    if kind == "gradient":
        return 1.1 * np.clip(0.5 + 0.5 * y, 0, 1)
    if kind == "noise":                                           # value noise on a lattice of the thing's own
        lattice = np.random.Generator(np.random.Philox(key=seed)).random((12, 12), np.float32)
        cx, cy = np.clip((x + 1.3) * 4.2, 0, 10.999), np.clip((y + 1.3) * 4.2, 0, 10.999)
        ix, iy = cx.astype(np.int32), cy.astype(np.int32)
        fx, fy = cx - ix, cy - iy
        up, down = lattice[iy, ix] * (1 - fx) + lattice[iy, ix + 1] * fx, lattice[iy + 1, ix] * (1 - fx) + lattice[iy + 1, ix + 1] * fx
        return np.clip((up + (down - up) * fy) * 4 - 1.5, 0, 1)
    # distance to the middle of the nearest band, in radii: 0 in the middle, pitch / 2 between two bands
    bands = [np.abs((v / pitch) % 1 - 0.5) * pitch for v in ((x, y) if kind != "stripes" else (y,))]
    if kind == "stripes":
        return cover((bands[0] - pitch / 4) * unit)
    if kind == "dots":
        return cover((np.hypot(*bands) - 0.3 * pitch) * unit)
    a, b = (cover((v - pitch / 4) * unit) for v in bands)
    return a + b - 2 * a * b


def _second(rgb: np.ndarray) -> np.ndarray:
    """The partner of a colour in a texture: the same hue, clearly lighter or darker."""
    bright = float(rgb @ np.array([0.2126, 0.7152, 0.0722], np.float32))
    return rgb * 0.45 if bright > 0.4 else rgb + (1 - rgb) * (0.22 if bright > 0.02 else 0.13)


def backdrop_light(b: Backdrop, size: int) -> np.ndarray:
    """The empty scene before lighting, linear float32 [size, size, 3]."""
    rgb = linear(BACKDROPS[b.colour])
    other = rgb * 0.62 if b.colour in LIGHT_BACKDROPS else rgb + 0.1 * (1 - rgb) + 0.5 * rgb
    if b.kind == "plain":
        return np.broadcast_to(rgb, (size, size, 3)).copy()
    x, y = _centres(size)[None, :] - 0.5, _centres(size)[:, None] - 0.5
    if b.kind == "noise":
        rng = np.random.Generator(np.random.Philox(key=b.seed))
        t = sum(w * (_bilinear(size, k) @ rng.random((k, k), np.float32) @ _bilinear(size, k).T) for k, w in ((4, 0.5), (8, 0.3), (16, 0.2)))
        t = np.clip(t * 2 - 0.5, 0, 1)
    else:
        c, s = np.float32(np.cos(b.angle)), np.float32(np.sin(b.angle))
        u, v = c * x + s * y, c * y - s * x
        t = np.clip(0.5 + u, 0, 1) if b.kind == "gradient" else 0.45 * pattern(b.kind, u, v, 0.14, size, b.seed)
    return rgb + t[..., None] * (other - rgb)


@dataclass
class Layer:
    """One thing as drawn: the window that it touches, its coverage there, and its distance in pixels."""
    window: Window
    alpha: np.ndarray
    distance: np.ndarray


@dataclass
class Picture:
    """A painted scene. `image` uint8 [H,W,3]; the maps below are made when asked."""
    scene: Scene
    image: np.ndarray
    layers: list[Layer]

    @property
    def size(self) -> int:
        return self.image.shape[0]

    def top(self) -> np.ndarray:
        """Which thing is seen, int8 [H,W]: its place in `scene.things`, -1 for the backdrop."""
        out = np.full(self.image.shape[:2], -1, np.int8)
        for i, layer in enumerate(self.layers):
            out[layer.window][layer.alpha >= 0.5] = i
        return out

    def masks(self) -> np.ndarray:
        """The visible part of each thing, bool [N,H,W], disjoint."""
        return self.top() == np.arange(len(self.layers), dtype=np.int8)[:, None, None]

    def depth(self) -> np.ndarray:
        """float32 [H,W], 0 near to 1 far; the backdrop is 1."""
        return np.array([*(t.z for t in self.scene.things), 1.0], np.float32)[self.top()]

    def edges(self) -> np.ndarray:
        """Visible outlines as antialiased lines, float32 [H,W] in [0,1]."""
        out = np.zeros(self.image.shape[:2], np.float32)
        for layer in self.layers:
            line = cover(np.abs(layer.distance) - 0.6)
            out[layer.window] = np.maximum(out[layer.window] * (1 - layer.alpha), line)
        return out

    def segments(self) -> np.ndarray:
        """Class map in the colours of `segment_palette`, float32 [H,W,3] in [0,1]."""
        rows = np.array([*(1 + THINGS.index(t.shape) for t in self.scene.things), 0])
        return segment_palette()[rows[self.top()]]

    def hint(self, which: str) -> np.ndarray:
        """A map that may steer a generator, as a picture, uint8 [H,W,3]: `edges`, `depth` (near is bright) or `segments`."""
        drawn = self.segments() if which == "segments" else self.edges() if which == "edges" else 1 - self.depth()
        return np.round(255 * (drawn if drawn.ndim == 3 else np.repeat(drawn[..., None], 3, 2))).astype(np.uint8)


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """bool [N,H,W] -> the extents as x0 y0 x1 y1 in [0,1], float32 [N,4]; an empty mask gives zeros."""
    n, h, w = masks.shape
    ends: list[np.ndarray] = []
    for seen, length in ((masks.max(1), w), (masks.max(2), h)):    # columns, rows in which the thing is seen
        ends += [seen.argmax(1) / length, np.where(seen.max(1), length - seen[:, ::-1].argmax(1), 0) / length]
    return np.stack([ends[0], ends[2], ends[1], ends[3]], 1).astype(np.float32).reshape(n, 4)


def keypoints_of(picture: Picture) -> np.ndarray:
    """Five places of every thing, float32 [N,5,3] (x y in [0,1], and 1 where it is the thing that is seen there): its middle, then half a radius
    towards its own top, right, bottom and left."""
    top, out = picture.top(), np.zeros((len(picture.scene.things), 5, 3), np.float32)
    for i, t in enumerate(picture.scene.things):
        turn, far = t.angle + np.array([0, -1, 0, 1, 2]) * np.pi / 2, 0.5 * t.r * np.array([0, 1, 1, 1, 1])
        x, y = t.x + far * np.cos(turn), t.y + far * np.sin(turn)
        column, row = ((v * picture.size).astype(int).clip(0, picture.size - 1) for v in (x, y))
        out[i] = np.stack([x, y, (top[row, column] == i) & (x >= 0) & (x < 1) & (y >= 0) & (y < 1)], 1)
    return out


def _window(x: float, y: float, reach: float, size: int) -> Window:
    def span(at: float) -> slice:
        return slice(max(0, int((at - reach) * size) - 1), max(0, min(size, int((at + reach) * size) + 2)))
    return span(y), span(x)


def _thing(canvas: np.ndarray, t: Thing, scene: Scene, size: int) -> Layer:
    distance_of, unit, at = field(t.shape, t.writing), t.r * size, _centres(size)
    lx, ly = np.cos(scene.light.angle), np.sin(scene.light.angle)
    if scene.light.shadow > 0:
        far, soft = 0.22 * t.r, 0.22 * t.r
        sx, sy = t.x - far * lx, t.y - far * ly
        rows, columns = window = _window(sx, sy, REACH * t.r + soft, size)
        if rows.stop > rows.start and columns.stop > columns.start:
            x, y = local(t, at[None, columns] + np.float32(far * lx), at[rows, None] + np.float32(far * ly))
            canvas[window] *= (1 - scene.light.shadow * cover(distance_of(x, y) * unit, soft * size))[..., None]
    rows, columns = window = _window(t.x, t.y, REACH * t.r, size)
    x, y = local(t, at[None, columns], at[rows, None])
    distance = distance_of(x, y) * unit
    alpha = cover(distance)
    rgb = linear(COLOURS[t.colour])
    paint = rgb if t.texture == "plain" else rgb + pattern(t.texture, x, y, 0.62, unit, t.seed)[..., None] * (_second(rgb) - rgb)
    if scene.light.shade > 0:
        px, py = (at[None, columns] - np.float32(t.x)) / t.r, (at[rows, None] - np.float32(t.y)) / t.r
        rim = np.clip(1 + distance / (0.3 * unit), 0, 1)         # 1 on the outline, 0 a third of a radius inside
        shade = 1 + scene.light.shade * (1.1 * (lx * px + ly * py) * (0.5 + 0.5 * rim) - 0.35 * rim)
        paint = paint * np.maximum(shade, 0.25)[..., None]
    canvas[window] += alpha[..., None] * (paint - canvas[window])
    return Layer(window, alpha, distance)


def paint(scene: Scene, size: int, empty: np.ndarray | None = None) -> Picture:
    """The scene at `size` x `size` pixels. `empty`: its `backdrop_light`, where several frames share it."""
    canvas = (backdrop_light(scene.backdrop, size) if empty is None else empty.copy()).astype(np.float32, copy=False)
    layers = [_thing(canvas, t, scene, size) for t in scene.things]
    light = scene.light
    if light.vignette > 0 or light.shade > 0 or light.brightness != 1:
        x, y = _centres(size)[None, :] - 0.5, _centres(size)[:, None] - 0.5
        glow = light.brightness * (1 + 0.35 * light.shade * (np.cos(light.angle) * 2 * x + np.sin(light.angle) * 2 * y))
        canvas *= (glow * (1 - light.vignette * 2 * (x * x + y * y)))[..., None].astype(np.float32)
    return Picture(scene, to_bytes(canvas), layers)
