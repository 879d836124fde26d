"""The recipe that `polysense new` writes: complete in shape, honest about what is missing."""
from __future__ import annotations

import re
from pathlib import Path

from polysense.base.catalogue import ROOT, catalogue
from polysense.base.errors import UserError

TEMPLATE = '''"""{id}: one sentence that says what the idea is.

Then the idea in prose, with its equations, for example:

    loss = -log p(y | f(x))                                    (Author et al. year, equation 1)

Say what moves besides gradients (teachers, queues), which parts are frozen, and what the paper's choice rests on.
"""
from dataclasses import dataclass

from torch import Tensor, nn

from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, System, ViewPlan, final

card = Card(
    name="{name}", paper="",
    arxiv=None, year=0,
    says="",
    needs=("image",), can=("encode_image",), official=None,
)

PARAMETERS = 0                               # as published, for paper()


@final
class {cls}(System):
    """Stand on an archetype instead of System where one fits: polysense/archetypes/."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int

    def __init__(self, c: Config):
        super().__init__()
        self.vision = nn.Linear(3, c.width)

    def losses(self, batch: Batch) -> Losses:
        return Losses()

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm."""
        return self.vision(image.mean((2, 3)))


def tiny() -> Preset:
    """Trains for real on two cores in minutes."""
    return Preset(
        data="scenes", config={cls}.Config(width=64),
        feed=Feed(image=ImagePlan(size=64), train_image=ViewPlan(size=64)),
        stages=(Stage(objective={cls}.losses, steps=400, batch_size=64, optim=Optim(lr=1e-3, warmup=40)),))


def paper() -> Preset:
    """The paper's configuration (say which table)."""
    return tiny()
'''


def write_skeleton(id: str, family: str, root: Path | None = None) -> Path:
    """Writes `root/family/id.py` and returns its path. UserError for an id that is taken, malformed, or a family that is none."""
    root = root or ROOT
    for word, what in ((id, "id"), (family, "family")):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", word):
            raise UserError(f"{word!r} cannot be the {what} of a system", "use snake_case: letters, digits and _, a letter first")
    if id in catalogue() or id in catalogue.__wrapped__(root):
        raise UserError(f"there is a system {id!r} already", "ids are unique over all families")
    if not root.is_dir():
        raise UserError(f"no folder {str(root)!r}", "give a systems/ folder with --into")
    folder = root / family
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").touch()
    words = id.split("_")
    path = folder / f"{id}.py"
    path.write_text(TEMPLATE.format(id=id, name=" ".join(w.upper() if len(w) < 4 else w.capitalize() for w in words),
                                    cls="".join(w.capitalize() for w in words)), encoding="utf-8")
    catalogue.cache_clear()
    return path
