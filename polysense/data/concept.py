"""A few pictures of one thing or in one style, under neutral captions that name it by a new word (Gal et al. 2022, section 4 and appendix)."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import WordsPlan
from polysense.data.images import ENDINGS
from polysense.data.sources import ListSource, Source

TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": ("a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "a picture of the {}", "a photo of one {}",
               "a close-up photo of a {}", "a good photo of the {}", "a bright photo of the {}", "a dark photo of a {}", "an image of a {}"),
    "style": ("a painting in the style of {}", "a rendering in the style of {}", "a picture in the style of {}", "a drawing in the style of {}",
              "the painting in the style of {}", "a close-up painting in the style of {}", "a bright painting in the style of {}"),
}


def concept(pictures: str | Path | Sequence[Any], word: str, kind: str | Sequence[str] = "object") -> ListSource:
    """A source of a folder of pictures (or paths, PIL pictures, arrays), each captioned with every template that names `word`.

    kind: "object", "style", or templates of your own with {} for the word. UserError where there are no pictures or the kind is unknown.
    """
    if isinstance(kind, str) and kind not in TEMPLATES:
        raise UserError(f"no templates for {kind!r}", f"choose {' or '.join(TEMPLATES)}, or give your own")
    templates = TEMPLATES[kind] if isinstance(kind, str) else tuple(kind)
    if isinstance(pictures, (str, Path)):
        folder = Path(pictures)
        if not folder.is_dir():
            raise UserError(f"no folder {str(folder)!r}", "check the path")
        items: list[Any] = sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS)
    else:
        items = list(pictures)
    if not items:
        raise UserError("there are no pictures to learn from", "three to five of one thing are enough")
    if absent := [t for t in templates if "{}" not in t]:
        raise UserError(f"the template {absent[0]!r} has no place for the word", "write {} there")
    return ListSource(f"concept {word}", [{"id": str(i), "image": x, "captions": [t.format(word) for t in templates]} for i, x in enumerate(items)],
                      ("image", "text"))


class Called(ListSource):
    """The pictures of a source under neutral captions that name them by a new word, over and over until there are `least`."""

    def __init__(self, base: Source, word: str, least: int, kind: str = "object"):
        n = len(base)
        captions = [t.format(word) for t in TEMPLATES[kind]]
        super().__init__(base.name, [{"id": base.id(i % n), "captions": captions} for i in range(n * -(-least // n))], ("image", "text"))
        self.base = base

    def heavy(self, i: int) -> tuple[str, ...]:
        return ("image",)

    def _load(self, i: int, key: str) -> object:
        return self.base.load(i % len(self.base), key)


def called(source: Any, plan: WordsPlan, least: int) -> Any:
    """The source itself where its captions have a new word of the plan (or where it is a stream), else its pictures called by the first one."""
    if not hasattr(source, "__len__") or not len(source):
        return source
    said = " ".join(c for i in range(min(len(source), 100)) for c in source.about(i).get("captions", ()))
    return source if any(word in said for word, _ in plan.new) else Called(source, plan.new[0][0], least)
