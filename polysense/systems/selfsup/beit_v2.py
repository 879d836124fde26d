"""BEiT v2: BEiT with codes that mean something, and a class token that has to know the whole picture.

First a tokenizer, by vector-quantised knowledge distillation (`VQKD`): a ViT, two layers with tanh down to a short vector of length one, the
nearest of K codes of length one; a shallow ViT on the map of codes says again what a frozen CLIP says of every patch:

    min  mean over patches of  1 - cos(o_i, t_i)  +  || sg(e_k) - z ||^2                                           (equation 3)

The gradient passes the choice unchanged; codes move as running means, in `after_step`. Then BEiT: some 40 percent of the patches hidden block by
block, their codes named. Beside it patch aggregation: the LAST class token and the patch tokens of an EARLIER layer l pass a shallow transformer
and have to name the same codes through the same norm and head, which they only can if the class token carries what the early patches lack:

    L = CE(W h_L) + CE(W agg([cls_L, h_l]))                                                                        (equation 5)

The branch is thrown away afterwards.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.archetypes.masked_model import MaskedModel, aggregated
from polysense.base.card import Card
from polysense.base.system import After, Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, Start, System, ViewPlan, final
from polysense.decoders.codes import CodeHead, CodeTarget
from polysense.decoders.features import FeatureTarget
from polysense.decoders.vqkd import UnitCodec
from polysense.mechanisms.mask_sampler import BlockMask, FillHidden
from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.head import Linear, TanhHead
from polysense.nn.masking import Masking
from polysense.nn.norm import LayerNorm
from polysense.nn.transformer import Transformer
from polysense.objectives.codes import commitment_loss, masked_ce
from polysense.objectives.health import of_codes
from polysense.objectives.masked import masked_cosine
from polysense.objectives.spread import gather
from polysense.towers.beit import BeitTower, shared_bias
from polysense.towers.clip import body, image_tower
from polysense.towers.shapes import plain_vit
from polysense.towers.vit import ViT
from polysense.weights import beit_v2

card = Card(
    name="BEiT v2", paper="Peng et al., BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers, 2022", arxiv="2208.06366", year=2022,
    says="Learns pictures without labels by naming codes that stand for CLIP's features, with a class token that knows the picture.",
    needs=("image",), can=("encode_image",), official="microsoft/unilm",
)

PARAMETERS = 192_556_912                     # ViT-B/16 with mask token and head 92.0M, two aggregating blocks 14.2M, the tokenizer's encoder 86.4M

weights = {"unilm": beit_v2.UNILM, "unilm_tokenizer": beit_v2.TOKENIZER}

MEAN, STD, HALF = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.5, 0.5, 0.5)
LEARNS = ("encoder.*", "hide.*", "decoder.*", "aggregate.*")


@final
class BEiTv2(MaskedModel):
    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedModel.Config):
        aggregate: Transformer.Config        # blocks alone, no norm: the encoder's is used
        early: int = 9                       # the layer that lends the patches

    def __init__(self, c: Config):
        super().__init__(c)
        self.aggregate, self.early = c.aggregate.build(), c.early

    def losses(self, batch: Batch) -> Losses:
        image = batch["image"]
        masking = self.masking(image)
        ids = self.target(image, masking)
        main, branch = self.said(image, masking)
        return Losses(codes=masked_ce(main, ids), cls=masked_ce(branch, ids))

    def said(self, image: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
        """Logits [M,K] of the hidden patches: of the last layer, and of the branch that has only the class token from there."""
        main, branch = aggregated(self.encoder, self.aggregate, self.early, image, masking, self.hide.token)
        return self.decoder(main, masking), self.decoder(branch, masking)

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm: the class token (the encoder's `pool`), no patch hidden."""
        return self.features(image)


@final
class VQKD(System):
    """The tokenizer. Start of BEiT v2 by its `codec`; `encode_codes` makes it usable on its own."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        codec: UnitCodec.Config
        decoder: ViT.Config                  # reads a map of codes in "patches" of one
        teacher: FeatureTarget.Config

    def __init__(self, c: Config):
        super().__init__()
        self.codec, self.decoder, self.teacher = c.codec.build(), c.decoder.build(), c.teacher.build()
        self.widen = TanhHead.Config(into=c.decoder.width, hidden=c.decoder.width, out=c.teacher.width).build()

    def losses(self, batch: Batch) -> Losses:
        image = batch["image"]
        truth = self.teacher.whole(image)
        encoded, quantized = self.codec(image)
        length_one = torch.nn.functional.normalize(encoded.float(), dim=-1)
        return Losses(features=masked_cosine(self.restored(quantized.passed), truth), commit=commitment_loss(length_one, quantized.vectors)).keeping(
            encoded=encoded, ids=quantized.ids)

    def restored(self, vectors: Tensor) -> Tensor:
        """Code vectors [B,h,w,D] -> what they say of the teacher's features, [B,N,width]."""
        return self.widen(self.decoder(vectors.permute(0, 3, 1, 2)).tokens[:, self.decoder.prefix:])

    @torch.no_grad()
    def after_step(self, after: After) -> None:
        self.codec.quantizer.move(gather(after.keep["encoded"]), gather(after.keep["ids"]), after.step)

    def health(self, keep: dict[str, Tensor]) -> dict[str, Tensor]:
        """How much of the codebook is in use, of the code numbers `ids` that the objective kept."""
        return of_codes(keep["ids"], self.codec.codes) if "ids" in keep else {}

    def encode_codes(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> code numbers [B,h,w]."""
        return self.codec.ids(image)


def blocks(width: int, heads: int, depth: int, scale: float) -> Transformer.Config:
    norm = LayerNorm.Config(eps=1e-6)
    return Transformer.Config(width=width, depth=depth, heads=heads, norm=None, block=PreNorm.Config(
        attn=Attention.Config(bias="q v out"), norm=norm, layer_scale=scale))


def preset(size: int, encoder: BeitTower.Config, aggregate: Transformer.Config, early: int, hidden: int, least: int, codec: UnitCodec.Config,
           start: str, data: str, stage: Stage) -> Preset:
    target = CodeTarget.Config(codec=codec, size=size, mean=MEAN, std=STD, codec_mean=HALF, codec_std=HALF)
    view = ViewPlan(size=size, scale=(0.2, 1.0), flip=0.5, jitter=0.8, jitter_by=(0.4, 0.4, 0.4, 0.0))
    return Preset(
        data=data, starts=(Start(into="target.codec", from_="beit_v2", take="codec", preset=start),), stages=(stage,),
        feed=Feed(image=ImagePlan(size=size, mean=MEAN, std=STD), train_image=view),
        config=BEiTv2.Config(encoder=encoder, sampler=BlockMask.Config(hidden=hidden, least=least), hide=FillHidden.Config(),
                             decoder=CodeHead.Config(), target=target, aggregate=aggregate, early=early))


def tiny() -> Preset:
    """64 px in patches of 8; the class token of the fourth layer and the patches of the third. Branches begin at full scale."""
    return preset(64, shared_bias(64, 8, 96, 4, 3, 1.0).but(pool="cls"), blocks(96, 3, 1, 1.0), 3, 25, 6, tiny_tokenizer().config.codec,  # type: ignore[attr-defined]
                  "tiny_tokenizer", "scenes", Stage(
                      objective=BEiTv2.losses, trainable=LEARNS, steps=500, batch_size=64,
                      optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=50, clip=3.0, lr_scale=(("*.relative.table", 20.0),))))


def paper() -> Preset:
    """ViT-B/16 on ImageNet-1k, 1600 epochs of batch 2048: patches of the ninth layer, two blocks (table 10); the colours of every picture are
    jittered, as released."""
    epoch = 1_281_167 // 2048
    made = preset(224, shared_bias(224, 16, 768, 12, 12, 0.1, 0.1).but(pool="cls"), blocks(768, 12, 2, 0.1), 9, 75, 16,
                  paper_tokenizer().config.codec, "paper_tokenizer", "imagenet1k", Stage(  # type: ignore[attr-defined]
                      objective=BEiTv2.losses, trainable=LEARNS, steps=1600 * epoch, batch_size=2048,
                      optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=10 * epoch, clip=3.0)))
    return made.but(**{"feed.train_image.jitter": 1.0})


def large() -> Preset:
    """ViT-L/16: patches of layer 21 of 24, scales begin at 1e-5."""
    return paper().but(**{"config.encoder": shared_bias(224, 16, 1024, 24, 16, 1e-5, 0.1).but(pool="cls"), "config.early": 21,
                          "config.aggregate": blocks(1024, 16, 2, 1e-5)})


def tokenizer(size: int, encoder: ViT.Config, codes: int, width: int, decoder: Transformer.Config, teacher: ViT.Config, said: int, start: str,
              data: str, stage: Stage) -> Preset:
    grid, plan = size // encoder.patch, ImagePlan(size=size)
    return Preset(
        data=data, stages=(stage,),
        feed=Feed(image=ImagePlan(size=size, mean=HALF, std=HALF), train_image=ViewPlan(size=size, scale=(0.08, 1.0), flip=0.5)),
        starts=tuple(Start(into=f"teacher.{a}", from_="clip", take=b, preset=start) for a, b in (("tower", "vision"), ("head", "image_head"))),
        config=VQKD.Config(
            codec=UnitCodec.Config(encoder=encoder, codes=codes, width=width),
            decoder=ViT.Config(image_size=grid, patch=1, channels=width, body=decoder, pool="mean"),
            teacher=FeatureTarget.Config(tower=teacher, head=Linear.Config(into=teacher.width, out=said), width=said, size=size, mean=HALF, std=HALF,
                                         tower_mean=plan.mean, tower_std=plan.std)))


TOKENIZES = ("codec.*", "decoder.*", "widen.*")


def tiny_tokenizer() -> Preset:
    """256 codes, taught by `clip` tiny_vit."""
    made = plain_vit(64, 8, 96, 3, 3)
    return tokenizer(64, made, 256, 16, made.body.but(depth=1), image_tower(64, 8, body(192, 6, 3)), 192, "tiny_vit", "scenes", Stage(
        objective=VQKD.losses, trainable=TOKENIZES, steps=400, batch_size=64,
        optim=Optim(lr=1.5e-3, weight_decay=1e-4, betas=(0.9, 0.99), warmup=40, clip=3.0)))


def paper_tokenizer() -> Preset:
    """8192 codes of 32 numbers, a decoder of three blocks, taught by CLIP ViT-B/16: 100 epochs of batch 512 (appendix and released script)."""
    epoch, made = 1_281_167 // 512, plain_vit(224, 16, 768, 12, 12)
    return tokenizer(224, made, 8192, 32, made.body.but(depth=3), image_tower(224, 16, body(768, 12, 12)), 512, "vit_b_16", "imagenet1k", Stage(
        objective=VQKD.losses, trainable=TOKENIZES, steps=100 * epoch, batch_size=512,
        optim=Optim(lr=5e-5 * 512 / 128, weight_decay=1e-4, betas=(0.9, 0.99), warmup=10 * epoch, final=1e-5 / 2e-4)))
