"""The source `scenes`: sample i is a function of (spec, split, i) alone. No files, no state; cheap to pickle into worker processes."""
from collections.abc import Iterator
from typing import Any

import numpy as np

from polysense.base.errors import UserError
from polysense.data.scenes import ask, edit, motion, sound
from polysense.data.scenes.options import Options, read_options
from polysense.data.scenes.paint import Picture, boxes_of, paint
from polysense.data.scenes.palette import DIGITS, THINGS
from polysense.data.scenes.say import captions
from polysense.data.scenes.world import SPLITS, Scene, World

Sample = dict[str, Any]
_STILL = frozenset({"id", "image", "captions", "label", "boxes", "box_label", "mask"})
OFFERS: dict[str, frozenset[str]] = {
    "": _STILL | {"qa", "depth", "hint"}, "single": _STILL, "combos": _STILL, "digits": _STILL, "qa": _STILL | {"qa"},
    "edits": _STILL | {"instruction", "edited", "edited_captions"}, "clips": frozenset({"id", "image", "captions", "label", "video"}),
    "sounds": _STILL | {"audio"}}
_SCENE, _WORDS, _QUESTIONS, _CHANGE = range(4)                    # independent streams of one sample


class ScenesSource:
    """Rendered scenes. `source[i]` is a dict with exactly the keys `source.offers`:

    id str · image uint8 [H,W,3] · captions list[str] · label int (of `classes`; in plain `scenes` that of the thing with the largest
    visible part) · boxes float32 [N,4] (x0 y0 x1 y1 in [0,1], visible part) · box_label int64 [N] (of `palette.THINGS`) · mask bool [N,H,W]
    (visible parts, disjoint) · qa list[(question, answer)] · instruction str, edited uint8 [H,W,3], edited_captions list[str] · depth float32
    [1,H,W], 0 near to 1 far · hint float32 [C,H,W] in [0,1] (edges 1, depth 1, segments 3, all 5 channels) · video uint8 [T,H,W,3] ·
    audio float32 [S] at 16 kHz, in [-1,1]. Raises IndexError beyond the end, UserError for a spec that cannot be read.
    """

    def __init__(self, spec: str = "scenes", split: str = "train"):
        self.name, self.split = spec, split
        self.options: Options = read_options(spec, split)
        o = self.options
        self.world = World(shapes=o.shapes, colours=o.colours, combos=o.combos, least=o.objects[0], most=o.objects[1], digits=o.digits,
                           style=o.style, split=split, alike=1.0 if o.variant == "sounds" else 0.3)
        if o.digits < 1 and not self.world.pairs():
            raise UserError(f"no {o.combos} pair of colour and shape is left in {spec!r}", "allow more shapes or colours, or say combos=all")
        self.offers: frozenset[str] = OFFERS[o.variant]
        self.classes: tuple[str, ...] = {
            "single": o.shapes, "combos": tuple(f"{c} {s}" for c in o.colours for s in o.shapes), "digits": DIGITS,
            "clips": motion.ACTIONS, "sounds": o.shapes}.get(o.variant, THINGS)

    def __len__(self) -> int:
        return self.options.n

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def stream(self, index: int, which: int) -> np.random.Generator:
        """The random numbers of one purpose of one sample: Philox keyed by (seed and split, index), its counter by the purpose."""
        key = np.array([self.options.seed * len(SPLITS) + SPLITS.index(self.split), index], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, which], np.uint64)))

    def scene(self, index: int) -> Scene:
        """The description of a sample, not painted: some 100 microseconds."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, there is no {index}")
        rng = self.stream(index % len(self), _SCENE)
        if self.options.variant == "sounds":
            return sound.alike(self.world, rng)
        return self.world.sample(rng)

    def __getitem__(self, index: int) -> Sample:
        scene, index, o = self.scene(index), index % len(self), self.options
        out: Sample = {"id": f"scenes-{o.seed}-{self.split}-{index:06d}"}
        change = self.stream(index, _CHANGE)
        if o.variant == "clips":
            clip = motion.animate(scene, self.world, change)
            frames = motion.film(clip, o.frames, o.size)
            return out | {"image": frames[0], "captions": clip.captions[:o.captions], "label": motion.ACTIONS.index(clip.action), "video": frames}
        picture = paint(scene, o.size)
        out |= self._still(picture) | {"captions": captions(scene, self.stream(index, _WORDS), o.captions)}
        if "qa" in self.offers:
            out["qa"] = ask.questions(scene, self.stream(index, _QUESTIONS))
        if "hint" in self.offers:
            out |= {"depth": picture.depth(), "hint": _hint(picture, o.hint)}
        if o.variant == "edits":
            edited = edit.edit(scene, self.world, change)
            out |= {"instruction": edited.instruction, "edited": paint(edited.scene, o.size).image,
                    "edited_captions": captions(edited.scene, self.stream(index, _WORDS), o.captions)}
        if o.variant == "sounds":
            out |= {"audio": sound.play(scene, o.seconds, change), "captions": sound.captions(scene, change)[:o.captions]}
        return out

    def _still(self, picture: Picture) -> Sample:
        things, masks = picture.scene.things, picture.masks()
        main = things[int(masks.sum((1, 2)).argmax())]
        label = self.classes.index(f"{main.colour} {main.shape}" if self.options.variant == "combos" else main.shape)
        return {"image": picture.image, "label": label, "boxes": boxes_of(masks), "mask": masks,
                "box_label": np.array([THINGS.index(t.shape) for t in things], np.int64)}


def _hint(picture: Picture, which: str) -> np.ndarray:
    maps = {"edges": picture.edges, "depth": picture.depth, "segments": picture.segments}
    return np.concatenate([m() for m in maps.values()]) if which == "all" else maps[which]()


def scenes_source(spec: str = "scenes", split: str = "train") -> ScenesSource:
    """The source that a spec names, `scenes[:variant][?option=value&...]`; variants and options stand in `options.py`."""
    return ScenesSource(spec, split)
