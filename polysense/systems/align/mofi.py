"""MOFI: pictures learn from the entities that their alt-texts name.

A data engine turns pairs from the web into entity labels (`Entities` in the feed): names found in the text, linked to a knowledge base, filtered
by how well a CLIP finds "name, description" in the picture. Then one picture tower learns from two sides at once,

    L = lambda L_classify + (1 - lambda) L_contrast
    L_classify = -log softmax over sampled classes of  alpha (cos(image, class) - m [true class])

The classifier has a row for each of millions of entities, of which a step sees those of its batch and some at random; its matrix is separate from the
text tower, which learns only from the contrast of pictures with their texts (alt-text or the entity's name with its description). Afterwards it is a
dual encoder whose picture features find pictures of the same thing.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import ImagePlan, Losses, Optim, Preset, Stage, TextPlan, ViewPlan, final
from polysense.base.telling import Entities, ToldFeed
from polysense.objectives.sampled import margin_softmax, sample_classes
from polysense.towers.clip import body, tiny_pair, vit_pair
from polysense.weights import clip_hf

card = Card(
    name="MOFI", paper="Wu et al., MOFI: Learning Image Representations from Noisy Entity Annotated Images, ICLR 2024", arxiv="2306.07952",
    year=2024, says="Learns picture features that find the same thing again, from entities named in alt-texts.",
    needs=("image", "text", "label"), can=("encode_image", "encode_text", "encode_patches"), official="apple/ml-mofi",
)

PARAMETERS = 1_173_620_737                   # ViT-B/16 and text 149.6M, two million entities of 512 numbers 1,024M

weights = {"hf": clip_hf.layout("mofi", "paper", own=("entities",), dim="config.dim")}       # towers alone: the classifier was not released


@final
class MOFI(DualEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        entities: int
        dim: int                             # of the joint space
        sampled: int = 512_000               # classes that one step compares
        alpha: float = 32.0
        margin: float = 0.2

    def __init__(self, c: Config):
        super().__init__(c)
        if c.sampled < 2 or c.entities < 2:
            raise UserError(f"{c.sampled} of {c.entities} entities", "a classifier compares at least two")
        self.entities = nn.Parameter(torch.randn(c.entities, c.dim) * c.dim ** -0.5)
        self.sampled, self.alpha, self.margin = c.sampled, c.alpha, c.margin

    def classify_and_compare(self, seen: dict[str, Tensor]) -> Losses:
        label = seen["label"]
        if int(label.max()) >= len(self.entities):
            raise UserError(f"a label of {int(label.max())}", f"this classifier has {len(self.entities)} entities: set config.entities")
        chosen = sample_classes(label, len(self.entities), self.sampled)
        return Losses(classify=margin_softmax(seen["image"], self.entities, label, chosen, self.alpha, self.margin), **self.compare(seen))


def weights_of(share: float) -> tuple[tuple[str, float], ...]:
    """Stage weights: share is lambda; 1 learns by classification alone, 0 by contrast alone."""
    return (("classify", share), ("contrast", 1 - share))


def tiny() -> Preset:
    """Captions name drawn things by colour and shape, the entities of a built-in knowledge base; a CLIP that learned the same pairs judges them."""
    return Preset(
        data="scenes:combos?n=5000", config=MOFI.Config(**tiny_pair(), dim=192, entities=256, sampled=128),
        feed=ToldFeed(image=ImagePlan(size=64), text=TextPlan(vocab=4096, length=48), train_image=ViewPlan(size=64, scale=(0.6, 1.0), flip=0.5),
                      told=(Entities(base="scenes", judge="clip", dropped=0.1, rare=2),)),
        stages=(Stage(objective=MOFI.classify_and_compare, embed=MOFI.embed_labelled, steps=400, batch_size=128, weights=weights_of(0.5),
                      optim=Optim(lr=1.5e-3, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6, warmup=40, clip=1.0)),))


def paper() -> Preset:
    """ViT-B/16 on the billion pictures of I2E, two million entities."""
    return Preset(
        data="i2e", config=MOFI.Config(**vit_pair(224, 16, body(768, 12, 12), body(512, 12, 8), 512), dim=512, entities=2_000_000),
        feed=ToldFeed(image=ImagePlan(size=224), text=TextPlan(vocab=49_408, length=77, pad="zero"), train_image=ViewPlan(size=224, scale=(0.9, 1.0)),
                      told=(Entities(base="wikidata", judge="clip:paper", rare=5),)),
        stages=(Stage(objective=MOFI.classify_and_compare, embed=MOFI.embed_labelled, steps=600_000, batch_size=32_768, weights=weights_of(0.5),
                      optim=Optim(lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98), warmup=2000)),))
