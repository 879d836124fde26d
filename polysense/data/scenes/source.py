"""The source `scenes`: sample i is a function of (spec, split, i) alone. No files, no state; cheap to pickle into worker processes."""
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from typing import Any

import numpy as np

from polysense.base.errors import UserError
from polysense.data.scenes import ask, edit, motion, nest, program, say, sound
from polysense.data.scenes.options import VARIANTS, Options, read_options
from polysense.data.scenes.paint import Picture, boxes_of, keypoints_of, paint
from polysense.data.scenes.palette import DIGITS, THINGS
from polysense.data.scenes.world import SPLITS, Scene, World
from polysense.data.sources import Sample, Source, offered

_SCENE, _WORDS, _QUESTIONS, _CHANGE, _NOISE = range(5)            # independent streams of one sample
_PIXELS = frozenset(("index", "image", "views", "crops", "label", "mask", "depth", "hint"))          # batch keys that no word or box is needed for
_PLACES, _SAID = frozenset(("boxes", "box_label", "keypoints")), frozenset(("text", "text_mask"))
_KEPT = 16                                                        # scenes and pictures: one sample is asked for key by key, drawn once


class ScenesSource(Source):
    """Rendered scenes. `source[i]` has `id` and, as the variant offers them:

    image uint8 [H,W,3] · captions list[str] · label int (of `classes`; in scenes of several things the class of the largest) · boxes float32
    [N,4] (x0 y0 x1 y1 in [0,1], visible part) · box_label int64 [N] (of `palette.THINGS`) · mask bool [N,H,W] (visible parts, disjoint; in
    `scenes:nested` a whole includes its parts) ·
    qa list[(question, answer)] · depth float32 [H,W], 0 near to 1 far · hint uint8 [H,W,3] (outlines; or depth, near is bright; or class
    colours) · video uint8 [T,H,W,3] · audio float32 [S] at 16 kHz, in [-1,1]. In `scenes:edits` the captions are phrasings of the
    instruction (`instruction` is the first), edited uint8 [H,W,3] the picture after it, before and after list[str] describe the two
    pictures. Raises IndexError beyond the end, UserError for a spec that cannot be read.
    """

    def __init__(self, spec: str = "scenes", split: str = "train"):
        self.options: Options = read_options(spec, split)
        o = self.options
        self.name, self.split, self.largest = spec, o.split, o.size
        self.offers, self.rate = offered(VARIANTS[o.variant].offers), sound.RATE if o.variant == "sounds" else None
        self.world = World(shapes=o.shapes, colours=o.colours, combos=o.combos, least=o.objects[0], most=o.objects[1], digits=o.digits,
                           style=o.style, split=o.split, alike=1.0 if o.variant == "sounds" else 0.3, sizes=o.sizes)
        if o.digits < 1 and not self.world.pairs():
            raise UserError(f"no {o.combos} pair of colour and shape is left in {spec!r}", "allow more shapes or colours, or say combos=all")
        self.classes = {
            "single": o.shapes, "combos": tuple(f"{c} {s}" for c in o.colours for s in o.shapes), "digits": DIGITS,
            "clips": motion.ACTIONS, "sounds": o.shapes}.get(o.variant, THINGS)
        self._recent: dict[tuple[str, int], Any] = {}
        self._parts = frozenset(("captions", "boxes", "qa"))          # what is worked out of what can be known of a sample

    def only(self, keys: Iterable[str]) -> "ScenesSource":
        """Pictures alone cost about half of pictures with boxes, captions and questions."""
        wanted = set(keys)
        if self.options.variant in ("edits", "programs") or not wanted <= _PIXELS | _PLACES | _SAID:
            return self
        out = copy(self)
        out._recent, out._parts = {}, frozenset(p for p, k in (("captions", _SAID), ("boxes", _PLACES)) if wanted & k)
        return out

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_recent": {}}

    def _once(self, what: str, i: int, make: Callable[[], Any]) -> Any:
        """`make()`, or what it made when asked a moment ago. Threads may make a thing twice, never a different one."""
        if (held := self._recent.get((what, i))) is None:
            held = self._recent[what, i] = make()
            for old in list(self._recent)[:-_KEPT]:
                self._recent.pop(old, None)
        return held

    def __len__(self) -> int:
        return self.options.n

    def id(self, i: int) -> str:
        return f"scenes-{self.options.seed}-{self.split}-{i:06d}"

    def stream(self, i: int, which: int) -> np.random.Generator:
        """The random numbers of one purpose of one sample: Philox keyed by (seed and split, index), its counter by the purpose."""
        key = np.array([self.options.seed * len(SPLITS) + SPLITS.index(self.split), i], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, which], np.uint64)))

    def scene(self, i: int) -> Scene:
        """The description of sample i, not painted: some 100 microseconds."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, there is no {i}")
        draw = nest.sample if self.options.variant == "nested" else World.sample
        scene = self._once("scene", i, lambda: draw(self.world, self.stream(i, _SCENE)))
        return sound.alike(scene) if self.options.variant == "sounds" else scene

    def clip(self, i: int) -> motion.Clip:
        """What happens in sample i of `scenes:clips`."""
        return self._once("clip", i, lambda: motion.animate(self.scene(i), self.stream(i, _CHANGE)))

    def edit(self, i: int) -> edit.Edit:
        """The instruction of sample i of `scenes:edits` and the scene after it."""
        return self._once("edit", i, lambda: edit.edit(self.scene(i), self.world, self.stream(i, _CHANGE)))

    def picture(self, i: int) -> Picture:
        """Sample i painted, with its maps."""
        scene = self.clip(i).scene if self.options.variant == "clips" else self.scene(i)
        return self._once("picture", i, lambda: paint(scene, self.options.size))

    def _masks(self, i: int) -> np.ndarray:
        picture = self.picture(i)
        return nest.masks(picture) if self.options.variant == "nested" else picture.masks()

    def captions(self) -> Iterator[str]:
        for i in range(len(self)):
            yield from self._said(i)

    def labels(self) -> list[int]:
        return [self._label(i) for i in range(len(self))]

    def _said(self, i: int) -> list[str]:
        variant, rng, most = self.options.variant, self.stream(i, _WORDS), self.options.captions
        if variant == "clips":
            return self.clip(i).captions[:most]
        if variant == "programs":
            return [said for said, _ in program.both_ways(self.scene(i))]
        if variant == "edits":
            return self.edit(i).instructions[:most]
        return sound.captions(self.scene(i), rng)[:most] if variant == "sounds" else say.captions(self.scene(i), rng, most)

    def _label(self, i: int) -> int:
        if self.options.variant == "clips":
            return motion.ACTIONS.index(self.clip(i).action)
        main = max(self.scene(i).things, key=lambda t: t.r)
        return self.classes.index(f"{main.colour} {main.shape}" if self.options.variant == "combos" else main.shape)

    def _about(self, i: int) -> Sample:
        out: Sample = {"captions": self._said(i) if "captions" in self._parts else [], "label": self._label(i)}
        if "boxes" in self.offers and "boxes" in self._parts:
            picture = self.picture(i)
            out["boxes"] = boxes_of(self._masks(i))
            out["keypoints"] = keypoints_of(picture)
            out["box_label"] = np.array([THINGS.index(t.shape) for t in picture.scene.things], np.int64)
        if self.options.variant == "programs":
            out["qa"] = program.both_ways(self.scene(i))
        elif "question" in self.offers and "qa" in self._parts:
            out["qa"] = ask.questions(self.scene(i), self.world, self.stream(i, _QUESTIONS))
        if self.options.variant == "edits":
            out["instruction"] = out["captions"][0]
            for key, scene in (("before", self.scene(i)), ("after", self.edit(i).scene)):
                out[key] = say.captions(scene, self.stream(i, _WORDS), self.options.captions)
        return out

    def _load(self, i: int, key: str) -> np.ndarray:
        o = self.options
        if key == "edited":
            return paint(self.edit(i).scene, o.size).image
        if key == "video":
            return motion.film(self.clip(i), o.frames, o.size)
        if key == "audio":
            return sound.play(self.scene(i), o.seconds, self.stream(i, _NOISE))
        picture = self.picture(i)
        if key == "mask":
            return self._masks(i)
        if key == "depth":
            return picture.depth()
        return picture.image if key == "image" else picture.hint(o.hint)


def scenes_source(spec: str = "scenes", split: str = "train") -> ScenesSource:
    """The source that a spec names, `scenes[:variant][?option=value&...]`; variants and options stand in `options.py`."""
    return ScenesSource(spec, split)
