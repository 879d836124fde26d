"""nCLIP and xCLIP: pictures and texts that belong together should fall into the same cluster.

A head on each tower gives logits over K clusters; p and q are the distributions of a picture and of its text. No negatives, no teacher:

    L_nCLIP = (H(q, p) + H(p, q)) / 2  +  l1 (E_i H(p_i) + E_i H(q_i)) / 2  -  l2 (H(E_i p_i) + H(E_i q_i)) / 2

The pair agrees, each sample is sure of its cluster, and over the global batch all clusters are used; without the last term everything falls into
one. The paper could not be read, so l1, l2 and w are this house's. Where all clusters are equally likely, logits that depend on the sample with
variance V, and correlate by r between a picture and its text, change the loss by V ((1 - l1) / 2 - r): with l1 < 1 they die out before r grows.
Those that all samples share change it by V (l2 - l1 - 1) / 2: with l2 < 1 + l1 everything falls into one cluster. Hence l1 = 1 and l2 = 2.5.
xCLIP adds CLIP's loss through heads of its own on the same towers:  L = L_CLIP + w L_nCLIP. Clusters alone make good features and poor
zero-shot labels; both together are better than CLIP at both.
"""
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, TextPlan, ViewPlan, final
from polysense.nn.mlp import MLP
from polysense.objectives.clusters import agreement, sharpness, spread_entropy
from polysense.objectives.contrastive import info_nce
from polysense.towers.clip import body, vit_pair

card = Card(
    name="nCLIP and xCLIP", paper="Zhou et al., Non-Contrastive Learning Meets Language-Image Pre-Training, CVPR 2023", arxiv="2210.09304",
    year=2023, says="Learns pictures and texts by clusters they share, without negatives, or together with CLIP.",
    needs=("image", "text"), can=("encode_image", "encode_text", "encode_patches"), official="shallowtoil/xclip",
)

PARAMETERS = 423_372_801                     # CLIP ViT-B/16 149.6M and two heads to 32,768 clusters, 273.8M; no total is published

WEIGHT, SURE, USED = 0.2, 1.0, 2.5           # w, l1, l2


@final
class XCLIP(DualEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        image_clusters: Spec
        text_clusters: Spec

    def __init__(self, c: Config):
        super().__init__(c)
        self.image_clusters, self.text_clusters = c.image_clusters.build(), c.text_clusters.build()

    def embed_clusters(self, batch: Batch) -> dict[str, Tensor]:
        image, text = self.vision.pooled(batch["image"]), self.text.pooled(batch["text"])
        return {"image": self.from_features(image), "text": F.normalize(self.text_head(text).float(), dim=-1),
                "image_logits": self.image_clusters(image).float(), "text_logits": self.text_clusters(text).float()}

    def compare_clusters(self, seen: dict[str, Tensor]) -> Losses:
        p, q = seen["image_logits"], seen["text_logits"]
        return Losses(contrast=info_nce(seen["image"], seen["text"], self.scale), agree=agreement(p, q),
                      sure=(sharpness(p) + sharpness(q)) / 2, used=-(spread_entropy(p) + spread_entropy(q)) / 2)


def weights_of(w: float, contrast: float = 1.0) -> tuple[tuple[str, float], ...]:
    """Stage weights: w = 0 is CLIP, contrast = 0 is nCLIP."""
    return (("contrast", contrast), ("agree", w), ("sure", w * SURE), ("used", w * USED))


def clusters(width: int, hidden: int, count: int) -> MLP.Config:
    return MLP.Config(width=width, hidden=hidden, out=count)


def tiny() -> Preset:
    """xCLIP."""
    towers = vit_pair(64, 8, body(128, 4, 2), body(128, 3, 2), 128, 4096, 48, 2)
    return Preset(
        data="natural_captions", config=XCLIP.Config(**towers, image_clusters=clusters(128, 256, 512), text_clusters=clusters(128, 256, 512)),
        feed=Feed(image=ImagePlan(size=64), text=TextPlan(vocab=4096, length=48), train_image=ViewPlan(size=64, scale=(0.5, 1.0), flip=0.5)),
        stages=(Stage(objective=XCLIP.compare_clusters, embed=XCLIP.embed_clusters, steps=400, batch_size=128, weights=weights_of(WEIGHT),
                      optim=Optim(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), warmup=40, clip=1.0)),))


def _alone(of: Preset) -> Preset:
    return of.but(**{"stages.0.weights": weights_of(1.0, 0.0), "stages.0.trainable": ("vision.*", "text.*", "image_clusters.*", "text_clusters.*")})


def tiny_nclip() -> Preset:
    """Without contrast: CLIP's heads learn nothing."""
    return _alone(tiny())


def paper() -> Preset:
    """xCLIP, ViT-B/16 with 32,768 clusters, 32 epochs of batch 4096 on 35M pairs."""
    towers, epoch = vit_pair(224, 16, body(768, 12, 12), body(512, 12, 8), 512), 35_000_000 // 4096
    return Preset(
        data="yfcc15m+cc3m+cc12m", config=XCLIP.Config(
            **towers, image_clusters=clusters(768, 4096, 32_768), text_clusters=clusters(512, 4096, 32_768)),
        feed=Feed(image=ImagePlan(size=224), text=TextPlan(vocab=49_408, length=77, pad="zero"), train_image=ViewPlan(size=224, scale=(0.5, 1.0))),
        stages=(Stage(objective=XCLIP.compare_clusters, embed=XCLIP.embed_clusters, steps=32 * epoch, batch_size=4096, weights=weights_of(WEIGHT),
                      optim=Optim(lr=1e-3, weight_decay=0.2, betas=(0.9, 0.98), warmup=epoch)),))


def paper_nclip() -> Preset:
    return _alone(paper())
