"""Two towers, one space. Abstract: a system adds its objective and is final."""
from collections.abc import Iterator
from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.system import After, Batch, Losses, Spec, System
from polysense.mechanisms.mask_sampler import RandomMask
from polysense.nn.masking import Masking
from polysense.objectives.contrastive import apart, info_nce, multi_positive


class DualEncoder(System):
    """Image and text towers, a head on each into a shared space, and a learned temperature.

    The temperature is stored as `log_scale` (CLIP, section 2.5: multiplied onto the cosines as exp(log_scale), kept at or below
    `max_scale`). Features are normalised in float32 whatever the autocast type. `embed` and `compare` are CLIP's objective in its two
    halves; a system that adds terms, or compares otherwise, brings its own under other names.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vision: Spec
        text: Spec
        image_head: Spec
        text_head: Spec
        scale: float = 1 / 0.07
        max_scale: float = 100.0

    def __init__(self, c: Config):
        super().__init__()
        self.vision, self.text = c.vision.build(), c.text.build()
        self.image_head, self.text_head = c.image_head.build(), c.text_head.build()
        self.log_scale = nn.Parameter(torch.tensor(log(c.scale)))
        self.max_log_scale = log(c.max_scale)

    @property
    def scale(self) -> Tensor:
        """exp(log_scale), never above `max_scale`. The clamp passes gradient at the bound, where after_step keeps it."""
        return self.log_scale.clamp(max=self.max_log_scale).exp()

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm."""
        return F.normalize(self.image_head(self.vision.pooled(image)).float(), dim=-1)

    def encode_part(self, image: Tensor, masking: Masking) -> Tensor:
        """The same of the visible patches alone: the hidden ones are not computed."""
        return F.normalize(self.image_head(self.vision(image, keep=masking.keep).pooled).float(), dim=-1)

    def from_features(self, features: Tensor) -> Tensor:
        """Cached pooled features of the image tower [B,W] -> [B,D], unit norm: the tower is not run."""
        return F.normalize(self.image_head(features).float(), dim=-1)

    def encode_text(self, text: Tensor) -> Tensor:
        """text [B,L] token ids -> [B,D], unit norm."""
        return F.normalize(self.text_head(self.text.pooled(text)).float(), dim=-1)

    def encode_patches(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,h,w,D], unit norm: the tower's local features through the same head."""
        return F.normalize(self.image_head(self.vision.dense(image)).float(), dim=-1)

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        """`image` and `text`, unit norm [B,D]. A batch with `features` of a locked image tower is used in place of its pictures."""
        return {"image": self.from_features(batch["features"]) if "features" in batch else self.encode_image(batch["image"]),
                "text": self.encode_text(batch["text"])}

    def compare(self, seen: dict[str, Tensor]) -> Losses:
        """The symmetric cross-entropy over all pairs of the global batch (Radford et al. 2021, figure 3)."""
        return Losses(contrast=info_nce(seen["image"], seen["text"], self.scale))

    def embed_labelled(self, batch: Batch) -> dict[str, Tensor]:
        """As `embed`, and the labels."""
        return {**self.embed(batch), "label": batch["label"]}

    def compare_labelled(self, seen: dict[str, Tensor]) -> Losses:
        """As `compare`, but samples of one label are positives of each other, those with a negative one of nobody (Yang et al. 2022, UniCL)."""
        return Losses(contrast=multi_positive(seen["image"], seen["text"], self.scale, apart(seen["label"])))

    @torch.no_grad()
    def doubts(self, batch: Batch) -> Iterator[str]:
        """Pictures or texts that differ and are one point all the same: a tower that looks at the wrong token, or at none."""
        self.eval()
        for key, encode in (("image", self.encode_image), ("text", self.encode_text)):
            if key in batch and bool((batch[key] != batch[key][:1]).any()):
                seen = encode(batch[key])
                if float((seen - seen[:1]).abs().max()) < 1e-6:
                    yield f"every {key} of a batch has the same feature: does the tower pool the right token?"

    @torch.no_grad()
    def after_step(self, after: After) -> None:
        self.log_scale.clamp_(max=self.max_log_scale)


class MaskedDualEncoder(DualEncoder):
    """Reads a random part of every picture while it learns (Li et al. 2023, FLIP)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        sampler: RandomMask.Config

    def __init__(self, c: Config):
        super().__init__(c)
        self.sampler = c.sampler.build()

    def embed_masked(self, batch: Batch) -> dict[str, Tensor]:
        """As `embed`, of pictures of which only a random part is read, anew for each."""
        image = batch["image"]
        masking = self.sampler(len(image), self.vision.grid_of(image), image.device)
        return {"image": self.encode_part(image, masking), "text": self.encode_text(batch["text"])}
