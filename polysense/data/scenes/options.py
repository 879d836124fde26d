"""Reading `scenes:single?n=5000&size=64&seed=1`."""
from dataclasses import dataclass, fields
from difflib import get_close_matches

from polysense.base.errors import UserError
from polysense.data.scenes.palette import COLOURS, SHAPES, SIZES
from polysense.data.scenes.world import SPLITS

COUNTS = {"train": 20000, "val": 1000, "test": 2000}


@dataclass(frozen=True)
class Options:
    """What stands behind the question mark, with its defaults.

    n: samples (0: 20000 train, 1000 val, 2000 test) · size: pixels · seed · captions: phrasings a sample · combos: `seen`, `heldout` or `all`
    pairs of colour and shape · objects: `2` or `1-4` things a scene · digits: chance that a thing is a handwritten digit · style: `rich` or
    `plain` · shapes, colours: how many of them (`6`), or which (`circle,star`) · sizes: which (`medium,large`: at 32 pixels a small thing is
    six across; digits are never small) · hint: `edges`, `depth` or `segments` · frames, of a clip · seconds, of a sound.
    """
    variant: str = ""
    split: str = "train"
    n: int = 0
    size: int = 64
    seed: int = 0
    captions: int = 5
    combos: str = "seen"
    objects: tuple[int, int] = (1, 4)
    digits: float = 0.12
    style: str = "rich"
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    sizes: tuple[str, ...] = tuple(SIZES)
    hint: str = "edges"
    frames: int = 8
    seconds: float = 1.0


@dataclass(frozen=True)
class Variant:
    """One kind of sample: what it is in a line, the batch keys that it offers, and its other defaults."""
    says: str
    offers: tuple[str, ...]
    defaults: dict[str, object]


_STILL = ("image", "text", "label", "boxes", "box_label", "mask", "keypoints")
_ONE: dict[str, object] = {"objects": (1, 1), "digits": 0.0}
VARIANTS: dict[str, Variant] = {
    "": Variant("drawn scenes of shapes and digits: pictures, words, boxes, masks, questions, hints",
                (*_STILL, "question", "answer", "depth", "hint"), {}),
    "single": Variant("drawn scenes of one thing; the class is its shape", _STILL, _ONE),
    "combos": Variant("drawn scenes of one thing; the class is colour and shape, test shows pairs never trained on", _STILL, _ONE),
    "digits": Variant("drawn scenes of one handwritten digit", _STILL, {"objects": (1, 1), "digits": 1.0}),
    "nested": Variant("drawn things with parts: a mask for each whole and for each part on it", _STILL, {"digits": 0.0}),
    "programs": Variant("scenes described in a formal language and in English, and the one as a question whose answer is the other",
                        ("image", "text", "label", "question", "answer"), {"objects": (1, 2), "digits": 0.0}),
    "qa": Variant("drawn scenes with questions and answers", (*_STILL, "question", "answer"), {}),
    "edits": Variant("drawn scenes with an instruction and the picture after it", (*_STILL, "edited"), {"objects": (1, 3)}),
    "clips": Variant("drawn scenes that move, with what happens in words", ("image", "text", "label", "video"), {"objects": (1, 2), "digits": 0.0}),
    "sounds": Variant("drawn scenes that beep: shape is timbre, colour is pitch", (*_STILL, "audio"), {"digits": 0.0})}
_FIXED = {"single": ("objects", "digits"), "combos": ("objects", "digits"), "digits": ("objects", "digits"),
          "sounds": ("digits",), "nested": ("digits", "objects")}
_CHOICES = {"combos": ("seen", "heldout", "all"), "style": ("rich", "plain"), "hint": ("edges", "depth", "segments")}
_LOW = {"n": 0, "size": 8, "seed": 0, "captions": 1, "frames": 2, "digits": 0.0, "seconds": 0.1}
_HIGH = {"size": 4096, "seed": 2 ** 48 - 1, "captions": 100, "frames": 256, "digits": 1.0, "seconds": 60.0, "n": 2 ** 40}


def read_options(spec: str, split: str) -> Options:
    """`scenes[:variant][?key=value&...]` and a split -> Options. Raises UserError that names the nearest option for a typo."""
    split = {"dev": "val"}.get(split, split)
    if split not in SPLITS:
        raise UserError(f"scenes have no split {split!r}", f"choose {', '.join(SPLITS)}")
    head, _, query = spec.partition("?")
    name, _, variant = head.partition(":")
    if name != "scenes":
        raise UserError(f"{spec!r} does not name scenes", "it looks like scenes, scenes:single or scenes:edits?size=32")
    if variant not in VARIANTS:
        raise UserError(f"scenes have no variant {variant!r}", f"choose {_nearest(variant, [v for v in VARIANTS if v])}")
    values: dict[str, object] = {"variant": variant, "split": split, **VARIANTS[variant].defaults}
    if variant == "combos" and split == "test":
        values["combos"] = "heldout"
    names = [f.name for f in fields(Options) if f.name not in ("variant", "split")]
    for word in filter(None, query.split("&")):
        key, _, text = word.partition("=")
        if key not in names:
            raise UserError(f"scenes have no option {key!r}", f"did you mean {_nearest(key, names)}?")
        if key in _FIXED.get(variant, ()):
            raise UserError(f"{key} is fixed in scenes:{variant}", "leave it away, or use plain scenes")
        values[key] = _read(key, text)
    out = Options(**values)  # type: ignore[arg-type]
    return out if out.n else Options(**{**values, "n": COUNTS[split]})  # type: ignore[arg-type]


def _nearest(word: str, names: list[str]) -> str:
    return " or ".join(get_close_matches(word, names, 2, 0.5)) or ", ".join(names)


def _read(key: str, text: str) -> object:
    default = getattr(Options, key)
    if key in _CHOICES:
        if text not in _CHOICES[key]:
            raise UserError(f"{key}={text} is unknown", f"choose {', '.join(_CHOICES[key])}")
        return text
    if key in ("shapes", "colours", "sizes"):
        return _names(key, text, default)
    try:
        if key == "objects":
            low, _, high = text.partition("-")
            pair = int(low), int(high or low)
            if not 1 <= pair[0] <= pair[1] <= 12:
                raise ValueError
            return pair
        value = type(default)(text)
    except ValueError:
        raise UserError(f"cannot read {key}={text}", "objects look like 3 or 1-4, at most 12" if key == "objects" else "a number is needed") from None
    if not _LOW[key] <= value <= _HIGH[key]:
        raise UserError(f"{key}={text} is out of range", f"it goes from {_LOW[key]} to {_HIGH[key]}")
    return value


def _names(key: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    if text.isdigit():
        if not 1 <= int(text) <= len(known):
            raise UserError(f"{key}={text} is out of range", f"there are {len(known)}")
        return known[:int(text)]
    chosen = tuple(text.split(","))
    for name in chosen:
        if name not in known:
            raise UserError(f"{name!r} is not one of the {key}", f"did you mean {_nearest(name, list(known))}?")
    return tuple(dict.fromkeys(chosen))
