"""SimMIM: hide large squares of a picture, and draw their pixels with one linear layer. Any encoder, also one that looks through windows.

The picture is cut into cells of 32 px, whatever the encoder's patches are, and ceil(0.6 cells) of them are hidden. The embeddings of their patches
are replaced by one learned token, after the patch embedding and before positions; all tokens pass the encoder, so that a Swin's windows stay what
they are. A 1x1 convolution and PixelShuffle turn each place of the last map into its pixels:

    L = sum of |y - x| over hidden pixels / their number                                                          (equation 1)

x is the picture as the encoder reads it. Simple choices are the finding: direct regression is no worse than naming colours, a heavier head transfers
worse, and what matters is that hidden pixels lie neither too near to visible ones nor too far from them (`distance`, AvgDist of figure 3:
10 to 20 px are good).
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.archetypes.masked_model import MaskedPictures
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, ViewPlan, final
from polysense.decoders.pixels import PixelTarget
from polysense.decoders.shuffle import ShuffleHead
from polysense.mechanisms.mask_sampler import CellMask, FillHidden
from polysense.nn.masking import Masking
from polysense.objectives.regress import masked_l1
from polysense.towers.beit import shared_bias
from polysense.towers.shapes import plain_vit
from polysense.towers.swin import Swin
from polysense.weights import simmim

card = Card(
    name="SimMIM", paper="Xie et al., SimMIM: A Simple Framework for Masked Image Modeling, CVPR 2022",
    arxiv="2111.09886", year=2022, says="Learns pictures without labels by drawing large hidden squares with one linear layer, on any encoder.",
    needs=("image",), can=("encode_image", "reconstruct"), official="microsoft/SimMIM",
)

PARAMETERS = 89_874_104                      # Swin-B of window 6 with its mask token 86.7M, and the head 1024 x 3072 3.1M

weights = {"hf": simmim.HF, "hf_vit": simmim.HF_VIT, "official": simmim.OFFICIAL}

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@final
class SimMIM(MaskedPictures):
    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedPictures.Config):
        pass

    def losses(self, batch: Batch) -> Losses:
        image = batch["image"]
        return Losses(pixels=masked_l1(*self.pairs(image, self.masking(image))))

    def distance(self, image: Tensor, masking: Masking) -> Tensor:
        """AvgDist: how far, in pixels, hidden pixels are from their nearest visible one; mean over the batch. Scalar."""
        hidden = masking.mask.unflatten(1, self.encoder.grid_of(image))
        hidden = hidden.repeat_interleave(image.shape[2] // hidden.shape[1], 1).repeat_interleave(image.shape[3] // hidden.shape[2], 2)
        down, across = ((torch.arange(n, device=image.device)[:, None] - torch.arange(n, device=image.device)).float() ** 2 for n in hidden.shape[1:])
        far = list[Tensor]()
        for one in hidden:                   # squares of distances are sums: first along rows, then along columns
            near = (across + torch.where(one, torch.inf, 0.0)[:, None]).amin(-1)
            far.append((down[..., None] + near).amin(1)[one].sqrt())
        return torch.cat(far).mean()


def preset(size: int, encoder: Spec, patch: int, stride: int, prefix: int, cell: int, data: str, stage: Stage) -> Preset:
    return Preset(
        data=data, stages=(stage,),
        feed=Feed(image=ImagePlan(size=size, mean=MEAN, std=STD),
                  train_image=ViewPlan(size=size, scale=(0.67, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5)),
        config=SimMIM.Config(encoder=encoder, sampler=CellMask.Config(ratio=0.6, side=cell // patch), hide=FillHidden.Config(),
                             decoder=ShuffleHead.Config(stride=stride, patch=patch, prefix=prefix), target=PixelTarget.Config(patch=patch)))


def tiny() -> Preset:
    """64 px, a Swin of two stages (patches of 4 px, windows of 4), cells of 16 px. Its few steps need a higher rate than the paper's."""
    return preset(64, Swin.Config(patch=4, base=48, depths=(2, 2), heads=(2, 4), window=4), 4, 8, 0, 16, "scenes", Stage(
        objective=SimMIM.losses, steps=600, batch_size=64, optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=60, clip=5.0)))


def _paper(made: Preset, epochs: int, lr: float) -> Preset:
    epoch = 1_281_167 // 2048
    return made.but(**{"stages.0.steps": epochs * epoch, "stages.0.optim.lr": lr * 2048 / 512, "stages.0.optim.warmup": 10 * epoch})


STAGE = Stage(objective=SimMIM.losses, steps=1, batch_size=2048,
              optim=Optim(lr=1e-4, weight_decay=0.05, clip=5.0, schedule="step", milestones=(7 / 8,)))


def paper() -> Preset:
    """Swin-B at 192 px in windows of 6, 800 epochs of batch 2048, the rate divided by ten at epoch 700 (section 4.3 and released settings)."""
    swin = Swin.Config(patch=4, base=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), window=6)
    return _paper(preset(192, swin, 4, 32, 0, 32, "imagenet1k", STAGE), 800, 1e-4)


def vit_b_16() -> Preset:
    """ViT-B/16 at 224 px: one table of relative positions, no absolute ones, branches scaled by 0.1."""
    return _paper(preset(224, shared_bias(224, 16, 768, 12, 12, 0.1, 0.1), 16, 16, 1, 32, "imagenet1k", STAGE), 800, 1e-4)


def plain_vit_b_16() -> Preset:
    """The same with learned absolute positions and a plain body, as transformers has it; a schedule of 100 epochs."""
    made = _paper(preset(224, plain_vit(224, 16, 768, 12, 12, pool="mean"), 16, 16, 1, 32, "imagenet1k", STAGE), 100, 2e-4)
    return made.but(**{"stages.0.optim.schedule": "cosine", "stages.0.optim.milestones": ()})
