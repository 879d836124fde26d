"""MVP: BEiT whose tokenizer is a frozen CLIP: what hidden patches would say to a text.

The teacher, CLIP's image tower with its projection into the space of texts, reads the whole crop; the student, BEiT's, has some 40 percent of the
patches hidden block by block behind one learned token, and a linear layer names what the teacher says of each:

    L = - mean over hidden patches i of  cos(W h_i + b, clip(x)_i)                                                (equation 4, here 1 - cos)

There is no codebook and nothing is quantised, which tells it from BEiT v2; no recipe for scale, which tells it from EVA. Both patch grids are the
same places. The teacher reads the crop with CLIP's mean and deviation, the student with its own. `positions` says what enters the mean: the hidden
patches ("masked"), every patch ("all"), or the hidden ones and the class token ("cls"); the paper leaves that open.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.archetypes.masked_model import MaskedModel
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Stage, Start, ViewPlan, final
from polysense.decoders.codes import CodeHead
from polysense.decoders.features import FeatureTarget
from polysense.mechanisms.mask_sampler import BlockMask, FillHidden
from polysense.nn.head import Linear
from polysense.nn.masking import Masking
from polysense.objectives.masked import masked_cosine
from polysense.towers.beit import BeitTower, shared_bias
from polysense.towers.clip import body, image_tower
from polysense.towers.vit import ViT

card = Card(
    name="MVP", paper="Wei et al., MVP: Multimodality-guided Visual Pre-training, ECCV 2022", arxiv="2203.05175", year=2022,
    says="Learns pictures without labels by saying of hidden patches what CLIP says who sees them.", needs=("image",), can=("encode_image",),
)

PARAMETERS = 172_252_496                     # ViT-B/16 with its mask token and head 86.1M, CLIP's image tower 86.2M; no total is published

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLACES = ("masked", "all", "cls")
LEARNS = ("encoder.*", "hide.*", "decoder.*")


@final
class MVP(MaskedModel):
    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedModel.Config):
        positions: str = "masked"

    def __init__(self, c: Config):
        super().__init__(c)
        if c.positions not in PLACES:
            raise UserError(f"no positions={c.positions!r}", f"it is one of {', '.join(PLACES)}")
        self.positions = c.positions

    def losses(self, batch: Batch) -> Losses:
        image = batch["image"]
        masking = self.masking(image)
        if self.positions == "masked":
            return Losses(features=masked_cosine(*self.pairs(image, masking)))
        said, truth = self.decoder.head(self.see(image, masking)), self.target.tokens(image)
        chosen = self.chosen(masking)
        return Losses(features=masked_cosine(said[chosen], truth[chosen]))

    def chosen(self, masking: Masking) -> Tensor:
        """[B, 1 + N], True where a token, the class token first, enters the mean."""
        first = torch.full_like(masking.mask[:, :1], self.positions == "cls")
        return torch.cat([first, masking.mask if self.positions == "cls" else torch.ones_like(masking.mask)], 1)

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm: the mean of all patch tokens, none hidden."""
        return self.features(image)

    def predicted(self, image: Tensor) -> Tensor:
        """image [B,3,H,W], nothing hidden -> [B,width], unit norm: the mean of what the student says of the patches, in the teacher's space."""
        said = self.decoder.head(self.encoder(image).tokens)[:, self.encoder.prefix:]
        return torch.nn.functional.normalize(said.float().mean(1), dim=-1)


def preset(size: int, encoder: BeitTower.Config, hidden: int, least: int, teacher: ViT.Config, width: int, start: str, data: str,
           stage: Stage) -> Preset:
    plan = ImagePlan(size=size)
    target = FeatureTarget.Config(tower=teacher, head=Linear.Config(into=teacher.width, out=width), width=width, size=size, mean=MEAN, std=STD,
                                  tower_mean=plan.mean, tower_std=plan.std)
    return Preset(
        data=data, stages=(stage,), feed=Feed(image=ImagePlan(size=size, mean=MEAN, std=STD),
                                              train_image=ViewPlan(size=size, scale=(0.2, 1.0), flip=0.5)),
        starts=tuple(Start(into=f"target.{a}", from_="clip", take=b, preset=start) for a, b in (("tower", "vision"), ("head", "image_head"))),
        config=MVP.Config(encoder=encoder, sampler=BlockMask.Config(hidden=hidden, least=least), hide=FillHidden.Config(),
                          decoder=CodeHead.Config(), target=target))


def tiny() -> Preset:
    """64 px in patches of 8, taught by `clip` tiny_vit; branches begin at full scale."""
    return preset(64, shared_bias(64, 8, 96, 4, 3, 1.0), 25, 6, image_tower(64, 8, body(192, 6, 3)), 192, "tiny_vit", "scenes", Stage(
        objective=MVP.losses, trainable=LEARNS, steps=500, batch_size=64,
        optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=50, clip=3.0, lr_scale=(("*.relative.table", 20.0),))))


def paper() -> Preset:
    """ViT-B/16 taught by CLIP ViT-B/16, 300 epochs on ImageNet-1k; what the paper does not say is BEiT's."""
    epoch = 1_281_167 // 2048
    return preset(224, shared_bias(224, 16, 768, 12, 12, 0.1, 0.1), 75, 16, image_tower(224, 16, body(768, 12, 12)), 512, "vit_b_16", "imagenet1k",
                  Stage(objective=MVP.losses, trainable=LEARNS, steps=300 * epoch, batch_size=2048,
                        optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=10 * epoch, clip=3.0)))
