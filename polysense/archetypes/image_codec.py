"""A picture as a small grid of code numbers, and back. Abstract: a system adds its objective and is final."""
from dataclasses import dataclass

from torch import Tensor

from polysense.base.system import Spec, System
from polysense.objectives.health import of_codes


class ImageCodec(System):
    """A codec part (VQCodec, DVAECodec: `codes`, `stride`, `ids(image)`, `decode(ids)`) and what it can do.

    Systems that model pictures as codes take the part, weights and all, by `Start(..., from_=<an image codec>, take="codec")`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        codec: Spec

    def __init__(self, c: Config):
        super().__init__()
        self.codec = c.codec.build()

    def health(self, keep: dict[str, Tensor]) -> dict[str, Tensor]:
        """How many codes are in use, of the code numbers `ids` that an objective kept."""
        return of_codes(keep["ids"], self.codec.codes) if "ids" in keep else {}

    def encode_codes(self, image: Tensor) -> Tensor:
        """image [B,3,H,W], as the feed says -> code numbers [B,h,w]."""
        return self.codec.ids(image)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """codes [B,h,w] -> image [B,3,H,W], normalised as the feed says."""
        return self.codec.decode(codes)

    def reconstruct(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> what is left of it after its codes, [B,3,H,W]."""
        return self.codec.decode(self.codec.ids(image))
