"""Shapes, painting, masks, boxes, hints and edited pictures."""
from dataclasses import replace

import numpy as np
import pytest

from polysense.data.scenes import edit as edits
from polysense.data.scenes.paint import Picture, boxes_of, cover, paint
from polysense.data.scenes.palette import BACKDROP_KINDS, BACKDROPS, COLOURS, SHAPES, TEXTURES, clear_on, segment_palette, to_bytes
from polysense.data.scenes.shapes import FIELDS, REACH, field, handwriting
from polysense.data.scenes.source import ScenesSource
from polysense.data.scenes.world import Backdrop, Light, Scene, Thing

DARK = Light(0.0, 0.0, 1.0, 0.0, 0.0)
WHITE = Backdrop("white", "plain", 0.0, 0)


def thing(**changes: object) -> Thing:
    return replace(Thing("circle", "red", "plain", "large", 0.5, 0.5, 0.25, 0.0, 0.5, 1), **changes)  # type: ignore[arg-type]


def alone(t: Thing, light: Light = DARK, backdrop: Backdrop = WHITE) -> Scene:
    return Scene((t,), backdrop, light)


def halved(image: np.ndarray) -> np.ndarray:
    """The mean of 2 x 2 pixels in linear light, back in bytes."""
    light = (image / 255.0) ** 2.2
    return 255 * light.reshape(image.shape[0] // 2, 2, -1, 2, 3).mean((1, 3)) ** (1 / 2.2)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_field_is_a_signed_distance_near_the_outline_and_stays_within_reach(shape: str):
    x, y = np.meshgrid(*[np.linspace(-1.3, 1.3, 521, dtype=np.float32)] * 2)
    d = FIELDS[shape](x, y)
    gy, gx = np.gradient(d, 2.6 / 520)
    near = np.abs(d) < 0.05
    assert 0.93 < np.median(np.hypot(gx, gy)[near]) < 1.07 and (np.hypot(gx, gy)[near] < 1.1).mean() > 0.99
    assert not (d[np.hypot(x, y) > REACH] < 0).any() and 0.15 < (d < 0).mean() * 1.3 ** 2 < 0.9
    assert field(shape)(np.float32([[0.0]]), np.float32([[2.0]])) > 0.5


def test_polygons_agree_with_a_naive_distance():
    corners = np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
    for px, py in np.random.default_rng(0).uniform(-1.2, 1.2, (50, 2)):
        walls = [np.hypot(*(np.array([px, py]) - a - np.clip(np.dot(np.array([px, py]) - a, b - a) / np.dot(b - a, b - a), 0, 1) * (b - a)))
                 for a, b in zip(corners, np.roll(corners, -1, 0))]
        want = min(walls) * (-1 if max(abs(px), abs(py)) < 0.8 else 1)
        assert FIELDS["square"](np.float32([[px]]), np.float32([[py]]))[0, 0] == pytest.approx(want, abs=1e-5)


def test_the_fifteen_shapes_look_different():
    masks = {s: paint(alone(thing(shape=s)), 48).masks()[0] for s in SHAPES}
    for a in SHAPES:
        for b in SHAPES:
            if a < b:
                assert (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum() < 0.93, (a, b)


def test_edges_are_antialiased_and_coverage_measures_area():
    picture = paint(alone(thing()), 64)
    red = np.unique(picture.image[:, :, 1])
    assert len(red) > 12, "intermediate values on the outline"
    assert picture.layers[0].alpha.sum() == pytest.approx(np.pi * (0.25 * 0.92 * 64) ** 2, rel=2e-3)
    assert cover(np.float32([-5, 0, 5])).tolist() == [1, 0.5, 0]


@pytest.mark.parametrize("texture", TEXTURES)
@pytest.mark.parametrize("kind", BACKDROP_KINDS)
def test_a_scene_looks_the_same_at_any_size(texture: str, kind: str):
    light = Light(0.7, 0.3, 0.95, 0.2, 0.4)
    scene = Scene((thing(texture=texture, x=0.4, shape="star"), thing(colour="blue", x=0.65, y=0.6, r=0.15, z=0.2)),
                  Backdrop("pale green", kind, 0.4, 3), light)
    small, large = paint(scene, 64), paint(scene, 128)
    off = np.abs(halved(large.image) - small.image)
    assert off.mean() < 2.0 and np.percentile(off, 99) < 30
    assert (small.masks() ^ large.masks()[:, ::2, ::2]).mean() < 0.02


def test_random_scenes_look_the_same_at_any_size():
    small, large = ScenesSource("scenes?size=64"), ScenesSource("scenes?size=128")
    for i in range(20):
        assert small.scene(i) == large.scene(i)
        assert np.abs(halved(large[i]["image"]) - small[i]["image"]).mean() < 2.5
        assert np.abs(small[i]["boxes"] - large[i]["boxes"]).max() <= 2.1 / 64


def test_boxes_and_masks_agree_and_masks_are_disjoint():
    source = ScenesSource("scenes?size=96&seed=3")
    for i in range(60):
        s, scene = source[i], source.scene(i)
        assert s["mask"].sum(0).max() == 1 and s["mask"].shape == (len(scene.things), 96, 96) and s["mask"].any((1, 2)).all()
        for (x0, y0, x1, y1), mask in zip(s["boxes"] * 96, s["mask"]):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert (round(x0), round(y0), round(x1), round(y1)) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        for t, mask in zip(scene.things, s["mask"]):
            alone_area = paint(replace(scene, things=(t,)), 96).masks().sum()
            assert mask.sum() > 0.4 * alone_area, "nothing is hidden by much more than half"
    assert boxes_of(np.zeros((1, 4, 4), bool)).tolist() == [[0, 0, 0, 0]]


def test_the_middle_of_a_plain_thing_has_its_named_colour():
    for colour, rgb in COLOURS.items():
        assert np.abs(paint(alone(thing(colour=colour)), 32).image[16, 16].astype(int) - rgb).max() <= 1
        source = ScenesSource(f"scenes:single?colours={colour}&combos=all&n=20")
        for i in (k for k in range(20) if source.scene(k).things[0].texture == "plain"):
            seen = np.median(source[i]["image"][source[i]["mask"][0]].astype(float), 0)
            off = {c: np.linalg.norm(seen - v) for c, v in COLOURS.items()}
            assert colour == min(off, key=lambda c: off[c]), "light and shade do not change the name"


def test_things_stand_out_from_their_backdrop():
    assert all(len(clear_on(b)) >= 6 for b in BACKDROPS)
    source = ScenesSource("scenes")
    blended = sum(t.colour not in clear_on(s.backdrop.colour) for s in map(source.scene, range(300)) for t in s.things)
    assert blended <= 8


def test_depth_edges_and_segments_follow_the_layers():
    near, far = thing(z=0.2, colour="blue", x=0.6, shape="square"), thing(z=0.7, x=0.4)
    picture = paint(Scene((far, near), WHITE, DARK), 64)
    depth, masks, edges, segments = picture.depth(), picture.masks(), picture.edges(), picture.segments()
    assert np.allclose([depth[masks[0]].max(), depth[masks[1]].min(), depth[0, 0]], [0.7, 0.2, 1.0])
    assert depth[32, 32] == np.float32(0.2), "the near thing wins where both are"
    assert edges[32, 32] == 0 and 0 < edges.mean() < 0.2
    outline = masks.any(0) ^ np.roll(masks.any(0), 1, 1)
    assert edges[outline].mean() > 0.3 and edges[masks[1]][edges[masks[1]] > 0.5].size
    rows = (0, 1 + SHAPES.index("circle"), 1 + SHAPES.index("square"))
    assert {tuple(c) for c in segments.reshape(-1, 3)} == {tuple(segment_palette()[k]) for k in rows}
    for which in ("edges", "depth", "segments"):
        hint = picture.hint(which)
        assert hint.shape == (64, 64, 3) and hint.dtype == np.uint8
    assert len(np.unique(segment_palette().round(3), axis=0)) == len(segment_palette())


def test_light_and_shadow_do_something():
    dark = paint(alone(thing()), 64).image.astype(int)
    shade = paint(alone(thing(), replace(DARK, shade=0.4)), 64).image.astype(int)
    assert shade[32, 44, 0] > shade[32, 20, 0], "the lit side is brighter"
    shadow = paint(alone(thing(), replace(DARK, shadow=0.5)), 64).image.astype(int)
    assert (dark - shadow)[:, :16].max() > 20 and (dark - shadow)[:, 50:].max() <= 0, "a shadow falls away from the light, on the left"
    corner = paint(alone(thing(), replace(DARK, vignette=0.4)), 64).image.astype(int)
    assert corner[0, 0, 0] < dark[0, 0, 0] - 20 and abs(corner[32, 32, 0] - dark[32, 32, 0]) <= 1


def touched(picture: Picture, least: float = 1e-9) -> np.ndarray:
    out = np.zeros(picture.image.shape[:2], bool)
    for layer in picture.layers:
        out[layer.window] |= layer.alpha >= least
    return out


def test_an_edit_changes_only_the_region_it_speaks_of():
    source, changed = ScenesSource("scenes:edits?size=48&seed=1"), 0
    for i in range(80):
        scene = source.scene(i)
        scene = replace(scene, light=replace(scene.light, shadow=0.0))    # shadows reach outside the things
        after = edits.edit(scene, source.world, source.stream(i, 9)).scene
        one, two = paint(scene, 48), paint(after, 48)
        moved = tuple(set(scene.things) ^ set(after.things))
        if scene.backdrop != after.backdrop:
            differ = (one.image != two.image).any(2)
            assert differ[~touched(one)].mean() > 0.5 and not differ[touched(one, 0.9999)].any()
            continue
        region = np.logical_or.reduce([touched(paint(replace(scene, things=(t,)), 48)) for t in moved])
        assert np.array_equal(one.image[~region], two.image[~region]), scene
        assert (one.image != two.image).any()
        changed += 1
    assert changed > 40


def test_digits_are_the_handwritten_ones():
    source = ScenesSource("scenes:digits?size=64&style=plain&n=60")
    ink, classes = handwriting()
    assert ink.shape == (1797, 8, 8)
    for i in range(60):
        t, s = source.scene(i).things[0], source[i]
        assert source.classes[s["label"]] == t.shape and s["label"] == classes[t.writing]
    t = replace(source.scene(0).things[0], x=0.5, y=0.5, r=0.4, angle=0.0)
    mask = paint(alone(t), 80).masks()[0]                         # the 8 x 8 samples cover radius 1, so pixels 8 to 72, eight each
    cells = mask[8:72, 8:72].reshape(8, 8, 8, 8).mean((1, 3))
    assert np.corrcoef(cells.ravel(), ink[t.writing].ravel())[0, 1] > 0.85


def test_bytes_are_srgb():
    assert to_bytes(np.float32([0, 0.2140411, 1, 3, -1])).tolist() == [0, 127, 255, 255, 0] or to_bytes(np.float32([0.2140411]))[0] in (127, 128)
