"""LiT: lock a good image tower and teach a text tower to read its features.

Two letters name a setting, image tower first: L locked and pre-trained, U unlocked and pre-trained, u unlocked from scratch (section 3).
The best is Lu: the contrastive loss of CLIP (global batch, learned temperature that starts at 10) trains the text tower alone.

    I = norm(vision(image)),  T = norm(text_head(bert(ids)[CLS])),  loss = (CE(rows) + CE(columns)) / 2

The locked tower is in eval mode and has no gradient, so its features of a fixed view can be computed once: a batch that carries `features`
is used in place of its pictures, with the same loss. The six settings differ in `trainable` and `starts` only.
"""
from dataclasses import dataclass
from typing import Any

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.card import Card
from polysense.base.system import Feed, ImagePlan, Optim, Preset, Stage, Start, TextPlan, final
from polysense.nn.head import LinearBias, Nothing
from polysense.nn.residual import Basic, Stem
from polysense.towers.bert import Bert
from polysense.towers.resnet import ResNet
from polysense.towers.shapes import bert, plain_vit
from polysense.weights import lit_official

card = Card(
    name="LiT", paper="Zhai et al., LiT: Zero-Shot Transfer with Locked-image text Tuning, CVPR 2022",
    arxiv="2111.07991", year=2022, says="Gives an existing image model zero-shot labels and search by training only a text tower.",
    needs=("image|features", "text"), can=("encode_image", "encode_text", "encode_patches"), official="google-research/vision_transformer (LiT)",
)

PARAMETERS = 638_440_000                     # LiT-L16L is published as 638.44M: ViT-L/16 without a head, BERT-large without pooler, a dense text head

weights = {"official": lit_official.LAYOUT}


@final
class LiT(DualEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        pass


def config(image: Any, text: Bert.Config) -> LiT.Config:
    """No image head: the text is projected to the image tower's width."""
    return LiT.Config(vision=image, text=text, image_head=Nothing.Config(),
                      text_head=LinearBias.Config(into=text.width, out=image.width, std=text.width ** -0.5), scale=10.0)


def tower() -> ResNet.Config:
    """The tower of `supervised` tiny, which lends its weights."""
    return ResNet.Config(layers=(1, 1, 1, 1), base=24, stem=Stem.Config(kernel=3, stride=2, pool=0), block=Basic.Config())


HALF = (0.5, 0.5, 0.5)
LOCKED = ("text.*", "text_head.*", "log_scale")
IMAGE, TEXT = Start(into="vision", from_="supervised", take="backbone"), Start(into="text", from_="lit", take="text", preset="tiny_uu")


def _tiny(trainable: tuple[str, ...], *starts: Start) -> Preset:
    return Preset(
        data="scenes:combos", starts=starts, config=config(tower(), bert(2048, 32, 128, 2, 2)),
        feed=Feed(image=ImagePlan(size=64, mean=HALF, std=HALF), text=TextPlan(kind="wordpiece", vocab=2048, length=32)),
        stages=(Stage(objective=LiT.compare, embed=LiT.embed, trainable=trainable, steps=300, batch_size=128,
                      optim=Optim(lr=1e-3, weight_decay=1e-4, warmup=30, clip=1.0)),))


def tiny() -> Preset:
    """Lu: locked pre-trained image tower, text tower from scratch."""
    return _tiny(LOCKED, IMAGE)


def tiny_Uu() -> Preset:
    """Unlocked pre-trained image tower, text tower from scratch."""
    return _tiny(("*",), IMAGE)


def tiny_uu() -> Preset:
    """Everything from scratch."""
    return _tiny(("*",))


def tiny_LU() -> Preset:
    """Locked image tower, pre-trained text tower that goes on training."""
    return _tiny(LOCKED, IMAGE, TEXT)


def tiny_UU() -> Preset:
    """Both pre-trained, both training."""
    return _tiny(("*",), IMAGE, TEXT)


def tiny_uL() -> Preset:
    """Image tower from scratch against a locked pre-trained text tower (its head stays trainable)."""
    return _tiny(("vision.*", "text_head.*", "log_scale"), TEXT)


def paper() -> Preset:
    """The public model of section 5.1: ViT-L/16 (ImageNet-21k AugReg), BERT-large, 60k steps of batch 16,384; their decay
    of 1e-4 is not multiplied by the rate of 1e-3."""
    return Preset(
        data="yfcc100m_clip+cc12m", config=config(plain_vit(224, 16, 1024, 24, 16), bert(30_522, 512, 1024, 24, 16)),
        starts=(Start(into="vision", from_="vit", take="backbone", preset="large"),),
        feed=Feed(image=ImagePlan(size=224, fit="squash", resample="bilinear", mean=HALF, std=HALF),
                  text=TextPlan(kind="wordpiece", vocab=30_522, length=16)),
        stages=(Stage(objective=LiT.compare, embed=LiT.embed, trainable=LOCKED, steps=60_000, batch_size=16_384, checkpoint_activations=True,
                      optim=Optim(name="adafactor", lr=1e-3, weight_decay=0.1, warmup=10_000, clip=1.0)),))
