"""MAE-CLIP: masked autoencoding beside contrast, and the question whether it helps.

Two kinds of passes through the same towers. Whole pictures and whole texts meet in CLIP's loss. Apart from that, three quarters of the patches of
each picture are hidden, its tower reads the rest, and a light decoder draws what is missing; some words of each text are hidden and guessed:

    L = L_CLIP + w_image MSE(normalised pixels of hidden patches) + w_text CE(hidden words)

Decoder, mask token and word predictor are thrown away. The deliverable is the difference to CLIP under equal steps, which the authors find on small
data and not on large. With both weights zero it is CLIP, without contrast a masked autoencoder of pictures and texts; how the picture's tokens are
pooled is a factor of its own: the class token, the mean of the patches, their largest, or a learned query's attention (`POOLS`).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Part, Preset, Spec, Stage, TextPlan, ViewPlan, final
from polysense.decoders.mae import MAEDecoder
from polysense.decoders.pixels import PixelTarget
from polysense.decoders.words import WordHead
from polysense.mechanisms.mask_sampler import RandomMask
from polysense.mechanisms.word_mask import WordMask
from polysense.nn.attentive import AttentivePool
from polysense.nn.build import build
from polysense.nn.masking import Masking
from polysense.objectives.spread import gather, world
from polysense.towers.bert import Bert
from polysense.towers.shapes import heads, plain_vit, pre_norm_bert, vit_body
from polysense.towers.vit import ViT

card = Card(
    name="MAE-CLIP", paper="Weers et al., Masked Autoencoding Does Not Help Natural Language Supervision at Scale, CVPR 2023", arxiv="2301.07836",
    year=2023, says="Adds masked autoencoding to CLIP and measures when it helps.",
    needs=("image", "text"), can=("encode_image", "encode_text", "encode_patches"),
)

PARAMETERS = 221_772_091                     # ViT-B/16 85.8M, text 12x768 108.6M, heads 0.8M, decoder 8x512 26.0M; no total is published


POOLS = ("cls", "mean", "max", "attention")


class PatchHead(Part):
    """Patches pooled to one vector behind the tower, then projected without bias: tokens [B,1+N,D] -> [B,out]; places [B,h,w,D] each for itself."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        out: int
        pool: AttentivePool.Config | None = None         # None: of each feature the largest

    def __init__(self, c: Config):
        super().__init__()
        self.pool = build(c.pool, width=c.into) if c.pool is not None else None
        self.out = nn.Linear(c.into, c.out, bias=False)
        nn.init.normal_(self.out.weight, std=c.into ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return self.out(x if self.pool is None else self.pool.out(self.pool.v(self.pool.norm_v(x))))
        return self.out(x[:, 1:].amax(1) if self.pool is None else self.pool(x[:, 1:]))


@final
class MAECLIP(DualEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        vision: ViT.Config
        text: Bert.Config
        sampler: RandomMask.Config
        decoder: MAEDecoder.Config
        target: PixelTarget.Config
        hide: WordMask.Config
        predict: WordHead.Config

    def __init__(self, c: Config):
        super().__init__(c)
        self.sampler, self.target, self.hide = c.sampler.build(), c.target.build(), c.hide.build()
        self.decoder = build(c.decoder, into=c.vision.width, out=c.target.width, grid=self.vision.grid)
        self.predict = c.predict.build()

    def draw(self, image: Tensor, masking: Masking) -> Tensor:
        """What the decoder draws of the hidden patches, of which the tower saw nothing: [B,M,P]."""
        return self.decoder(self.vision(image, keep=masking.keep).tokens, masking)

    def embed_masked(self, batch: Batch) -> dict[str, Tensor]:
        """Features of the whole samples; beside them each sample's error of hidden pixels, and of hidden words with their number."""
        image, text = batch["image"], batch["text"]
        masking = self.sampler(len(image), self.vision.grid_of(image), image.device)
        with torch.no_grad():
            target = self.target(image, masking)
        pixels = (self.draw(image, masking).float() - target.float()).square().mean((1, 2))
        hidden, chosen = self.hide(text)
        said = self.predict(self.text(hidden, mask=text != self.text.pad).tokens, self.text.embed.weight).float()
        words = F.cross_entropy(said.mT, text.masked_fill(~chosen, -100), ignore_index=-100, reduction="none").sum(1)
        return {**self.embed(batch), "pixels": pixels, "words": words, "hidden": chosen.sum(1).float()}

    def compare_masked(self, seen: dict[str, Tensor]) -> Losses:
        """Three terms; the mean over hidden words is that of the global batch."""
        hidden = gather(seen["hidden"].detach()).sum().clamp(min=1) / world()[1]
        return Losses(**self.compare({k: seen[k] for k in ("image", "text")}), pixels=seen["pixels"].mean(), words=seen["words"].sum() / hidden)


def weights_of(pixels: float, words: float, contrast: float = 1.0) -> tuple[tuple[str, float], ...]:
    """Stage weights: (0, 0) is CLIP; contrast = 0 is M3AE, with words = 0 too it is MAE."""
    return (("contrast", contrast), ("pixels", pixels), ("words", words))


def config(size: int, patch: int, image: tuple[int, int, int], text: tuple[int, int, int], decoder: tuple[int, int, int], dim: int, vocab: int,
           length: int, mask: int, special: tuple[int, ...], pool: str = "cls") -> MAECLIP.Config:
    """image, text and decoder: (width, depth, heads); mask and special (padding, start, end) are ids; pool: one of POOLS."""
    ends = heads(image[0], text[0], dim)
    if pool in POOLS[2:]:
        ends["image_head"] = PatchHead.Config(into=image[0], out=dim, pool=AttentivePool.Config(heads=image[2]) if pool == "attention" else None)
        pool = "none"
    return MAECLIP.Config(vision=plain_vit(size, patch, *image, pool=pool), text=pre_norm_bert(vocab, length, *text), **ends,
                          sampler=RandomMask.Config(ratio=0.75), decoder=MAEDecoder.Config(body=vit_body(*decoder)),
                          target=PixelTarget.Config(patch=patch, norm="patch"), hide=WordMask.Config(vocab=vocab, mask=mask, special=special),
                          predict=WordHead.Config(width=text[0], vocab=vocab))


def tiny() -> Preset:
    return Preset(
        data="natural_captions", config=config(64, 8, (128, 4, 2), (128, 3, 2), (96, 2, 3), 128, 4096, 48, 4, (0, 1, 2)),
        feed=Feed(image=ImagePlan(size=64), text=TextPlan(kind="wordpiece", vocab=4096, length=48), train_image=ViewPlan(size=64, scale=(0.5, 1.0))),
        stages=(Stage(objective=MAECLIP.compare_masked, embed=MAECLIP.embed_masked, steps=400, batch_size=128, weights=weights_of(0.5, 0.1),
                      optim=Optim(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), warmup=40, clip=1.0)),))


def paper() -> Preset:
    """ViT-B/16 on 11.3 million pairs, batch 16,384."""
    return _paper("cls")


def mean_pooled() -> Preset:
    """The same read by the mean of its patches."""
    return _paper("mean")


def max_pooled() -> Preset:
    """By the largest of its patches."""
    return _paper("max")


def attention_pooled() -> Preset:
    """By a learned query over its patches."""
    return _paper("attention")


def _paper(pool: str) -> Preset:
    epoch = 11_300_000 // 16_384
    return Preset(
        data="cc12m+cc3m", config=config(224, 16, (768, 12, 12), (768, 12, 12), (512, 8, 16), 512, 30_522, 77, 103, (0, 101, 102), pool),
        feed=Feed(image=ImagePlan(size=224), text=TextPlan(kind="wordpiece", vocab=30_522, length=77),
                  train_image=ViewPlan(size=224, scale=(0.5, 1.0))),
        stages=(Stage(objective=MAECLIP.compare_masked, embed=MAECLIP.embed_masked, steps=32 * epoch, batch_size=16_384, weights=weights_of(1.0, 0.1),
                      optim=Optim(lr=5e-4, weight_decay=0.2, betas=(0.9, 0.98), warmup=2000)),))
