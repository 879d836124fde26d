"""What a language model is shown of a picture: the tokens of its places."""
from dataclasses import dataclass

from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part


class PatchTokens(Part):
    """The patch tokens after one block of a ViT (LLaVA: the last but one), without class token and before any final norm; or, of any image
    tower, its `dense` features. Names: `tower`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        tower: Spec
        layer: int | None = -2               # the block after which, counted from the end; None: `tower.dense`
        skip: int | None = None              # leading tokens left out; None: all that are no patches

        @property
        def width(self) -> int:
            return self.tower.width  # type: ignore[attr-defined,no-any-return]

    def __init__(self, c: Config):
        super().__init__()
        self.tower, self.layer = c.tower.build(), c.layer
        self.skip = getattr(self.tower, "prefix", 0) if c.skip is None else c.skip
        if c.layer is not None and not (hasattr(self.tower, "embed") and hasattr(self.tower, "body")):
            raise UserError(f"{type(self.tower).__name__} has no blocks to read after", "set layer=None: its dense features are read")
        if c.layer is not None and not -len(self.tower.body.blocks) <= c.layer < len(self.tower.body.blocks):
            raise UserError(f"layer={c.layer}", f"the tower has {len(self.tower.body.blocks)} blocks")

    def forward(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,P,width], row by row. Later blocks are not computed. Raises UserError for what the tower refuses."""
        if self.layer is None:
            return self.tower.dense(image).flatten(1, 2)
        blocks = len(self.tower.body.blocks)
        return self.tower.body.layers(self.tower.embed(image)[0], stop=self.layer % blocks + 1)[-1][:, self.skip:]
