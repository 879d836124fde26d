"""What the proofs of dual encoders share: one small pair of towers for pictures of 32 pixels, sets told by sentences, and their scores."""
from collections.abc import Sequence
from typing import Any

from polysense.base.system import Preset
from polysense.data import source
from polysense.data.named import DIGIT_SAYINGS, DIGITS
from polysense.data.retold import prompted
from polysense.data.sources import ListSource, Source, Subset
from polysense.proofs.arms import exam, some_of
from polysense.systems.align import clip
from polysense.towers.clip import body, vit_pair
from polysense.towers.shapes import heads, plain_vit, pre_norm_bert

SIZE, VOCAB, LENGTH = 32, 1024, 24


def pair(patch: int = 8, width: int = 96, depth: int = 3) -> dict[str, Any]:
    """CLIP's towers and heads, small."""
    return vit_pair(SIZE, patch, body(width, depth, 3), body(width, 2, 3), width, vocab=VOCAB, length=LENGTH, end=2)


def plain_pair(patch: int = 4, width: int = 96, depth: int = 3, **vision: Any) -> dict[str, Any]:
    """Plain towers: a ViT without CLIP's first norm, and text read both ways."""
    return {"vision": plain_vit(SIZE, patch, width, depth, 3, **vision), "text": pre_norm_bert(VOCAB, LENGTH, width, 2, 3),
            **heads(width, width, width)}


def fitted(preset: Preset, config: Any, steps: int, **more: Any) -> Preset:
    """A preset with these towers, for pictures of 32 pixels and so many steps of its first stage."""
    sizes = {"feed.image.size": SIZE, "feed.train_image.size": SIZE, "feed.text.vocab": VOCAB, "feed.text.length": LENGTH, "stages.0.steps": steps}
    if preset.feed.train_image is None:
        del sizes["feed.train_image.size"]
    return preset.but(config=config).but(**{**sizes, "stages.0.optim.lr": 2e-3, **more})


def plain_clip(steps: int, **more: Any) -> Preset:
    """CLIP with these towers: the baseline of most rows."""
    return fitted(clip.tiny(), clip.CLIP.Config(**pair()), steps, **more)


def digits(n: int, seed: int) -> Source:
    """Handwritten digits with sentences about them."""
    return prompted(some_of(source("mnist"), n, seed), DIGIT_SAYINGS, "digits with sentences")


def kept(base: Source) -> ListSource:
    """A drawn source painted once, held in memory: asked again and again for what it says, it would paint again and again."""
    rows = [{**base.about(i), "image": base.load(i, "image")} for i in range(len(base))]
    return ListSource(base.name, [{k: r[k] for k in ("id", "image", "captions", "label")} for r in rows], ("image", "text", "label"),
                      split=base.split, classes=base.classes, largest=base.largest)


def of_classes(base: Source, labels: Sequence[int]) -> Source:
    """The samples of some classes, numbered as before."""
    wanted = set(labels)
    return Subset(base, [i for i, label in enumerate(base.labels()) if label in wanted])


def reads_digits(subject: Any, test: Source) -> float:
    """Zero-shot accuracy among the names of the ten digits."""
    return exam("zero_shot", subject, test, "accuracy", templates=DIGIT_SAYINGS, names=DIGITS)
