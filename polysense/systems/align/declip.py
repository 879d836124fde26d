"""DeCLIP: every supervision that a pair of picture and text holds.

Each sample comes as two views of its picture and two tellings of its text (the second with a word replaced, moved or left out). Beside CLIP's loss,

    image   SimSiam between the two views: predictor(projector(x)) against projector(x'), which gets no gradient
    words   masked words of the text are guessed by the causal text tower (the masked text is also the one that CLIP's loss sees)
    views   InfoNCE of the three other pairs of a view and a telling
    near    the nearest text in a queue of earlier texts is one more positive for both views, from pictures to texts:
            the negatives are the neighbours of the others; the queue is read before this step's texts enter it

    L = (1 - a - b - g) L_CLIP + a (L_image + L_words) + b L_views + g L_near,     a = b = g = 0.2                 (equation 9)
"""
from dataclasses import dataclass
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.card import Card
from polysense.base.system import After, Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, TextPlan, ViewPlan, final
from polysense.mechanisms.queue import Queue
from polysense.mechanisms.word_mask import WordMask
from polysense.nn.head import LinearBias, Projector
from polysense.objectives.contrastive import info_nce, nearest, one_way_nce
from polysense.objectives.spread import gather, world
from polysense.objectives.twin import mirror_cosine
from polysense.towers.clip import body, vit_pair
from polysense.weights import declip_official

card = Card(
    name="DeCLIP", paper="Li et al., Supervision Exists Everywhere: A Data Efficient Contrastive Language-Image Pre-training Paradigm, ICLR 2022",
    arxiv="2110.05208", year=2022, says="Learns from fewer pairs by using all that each of them tells about itself and its neighbours.",
    needs=("views", "text", "retold"), can=("encode_image", "encode_text", "encode_patches"), official="Sense-GVT/DeCLIP",
)

PARAMETERS = 180_301_314                     # CLIP ViT-B/32 151.3M, SimSiam's heads 3.7M, word predictor 25.3M; no total is published

weights = {"official": declip_official.LAYOUT}


@final
class DeCLIP(DualEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        projector: Spec
        predictor: Spec
        guess: Spec                          # of words, on the text tower's tokens
        hide: WordMask.Config
        queue: Queue.Config
        min_scale: float = 1.0

    def __init__(self, c: Config):
        super().__init__(c)
        self.projector, self.predictor, self.guess = c.projector.build(), c.predictor.build(), c.guess.build()
        self.hide, self.queue = c.hide.build(), c.queue.build()
        self.min_log_scale = log(c.min_scale)

    def embed_all(self, batch: Batch) -> dict[str, Tensor]:
        text, out = batch["text"], dict[str, Tensor]()
        for name, view in zip(("one", "two"), batch["views"].unbind(1), strict=True):
            seen = self.image_head(self.vision.pooled(view))
            out[name], out[f"{name}_z"] = F.normalize(seen.float(), dim=-1), self.projector(seen)
            out[f"{name}_p"] = self.predictor(out[f"{name}_z"])
        hidden, chosen = self.hide(text)
        said = self.text(hidden)
        guessed = F.cross_entropy(self.guess(said.tokens).float().mT, text.masked_fill(~chosen, -100), ignore_index=-100, reduction="none")
        return out | {"text": F.normalize(self.text_head(said.pooled).float(), dim=-1), "retold": self.encode_text(batch["retold"]),
                      "words": guessed.sum(1), "hidden": chosen.sum(1).float()}

    def compare_all(self, seen: dict[str, Tensor]) -> Losses:
        one, two, text, retold, s = (*(seen[k] for k in ("one", "two", "text", "retold")), self.scale)
        near = [nearest(t.detach(), self.queue.keys).to(t.dtype) for t in (text, retold)]
        hidden = gather(seen["hidden"].detach()).sum().clamp(min=1) / world()[1]
        return Losses(
            clip=info_nce(one, text, s), image=mirror_cosine(seen["one_p"], seen["two_p"], seen["one_z"], seen["two_z"]),
            words=seen["words"].sum() / hidden, views=(info_nce(two, text, s) + info_nce(one, retold, s) + info_nce(two, retold, s)) / 3,
            near=torch.stack([one_way_nce(v, n, s) for v in (one, two) for n in near]).mean()).keeping(text=gather(text))

    @torch.no_grad()
    def after_step(self, after: After) -> None:
        super().after_step(after)
        self.log_scale.clamp_(min=self.min_log_scale)
        self.queue.push(after.keep["text"])


def weights_of(a: float = 0.2, b: float = 0.2, g: float = 0.2) -> tuple[tuple[str, float], ...]:
    """Stage weights; all zero is CLIP."""
    return (("clip", 1 - a - b - g), ("image", a), ("words", a), ("views", b), ("near", g))


def heads(dim: int, hidden: int, bottleneck: int, width: int, vocab: int) -> dict[str, Any]:
    return {"projector": Projector.Config(widths=(dim, hidden, hidden, hidden), last="scaled"),
            "predictor": Projector.Config(widths=(hidden, bottleneck, hidden)), "guess": LinearBias.Config(into=width, out=vocab, std=width ** -0.5)}


def strong(size: int) -> ViewPlan:
    """MoCo v2's."""
    return ViewPlan(size=size, scale=(0.2, 1.0), flip=0.5, jitter=0.8, jitter_by=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=0.5)


def tiny() -> Preset:
    """The mask's id lies behind the vocabulary of the trained tokeniser."""
    towers, view = vit_pair(64, 8, body(128, 4, 2), body(128, 3, 2), 128, 4097, 48, 2), strong(64).but(scale=(0.4, 1.0))
    return Preset(
        data="natural_captions", config=DeCLIP.Config(**towers, **heads(128, 256, 64, 128, 4097), queue=Queue.Config(size=2048, width=128),
                                                      hide=WordMask.Config(vocab=4097, mask=4096, special=(0, 1, 2))),
        feed=Feed(image=ImagePlan(size=64), text=TextPlan(vocab=4096, length=48), views=(view, view)),
        stages=(Stage(objective=DeCLIP.compare_all, embed=DeCLIP.embed_all, steps=300, batch_size=128, weights=weights_of(),
                      optim=Optim(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), warmup=30, clip=1.0)),))


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def paper() -> Preset:
    """ViT-B/32 as released for YFCC15M: batch 4096, 128,000 iterations, log scale kept between 3 and 6, pictures scaled as ImageNet's."""
    towers = vit_pair(224, 32, body(768, 12, 12), body(512, 12, 8), 512, vocab=49_409, end=49_407)
    towers["text_head"] = LinearBias.Config(into=512, out=512, std=512 ** -0.5)
    config = DeCLIP.Config(**towers, **heads(512, 1024, 512, 512, 49_409), queue=Queue.Config(size=65_536, width=512), min_scale=20.0855,
                           max_scale=403.43, hide=WordMask.Config(vocab=49_409, mask=49_408, special=(0, 49_406, 49_407)))
    return Preset(
        data="yfcc15m", config=config, feed=Feed(
            image=ImagePlan(size=224, resample="bilinear", mean=MEAN, std=STD), text=TextPlan(vocab=49_408, length=77, pad="zero"),
            views=(strong(224), strong(224))),
        stages=(Stage(objective=DeCLIP.compare_all, embed=DeCLIP.embed_all, steps=128_000, batch_size=4096, weights=weights_of(),
                      optim=Optim(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), warmup=2500)),))
