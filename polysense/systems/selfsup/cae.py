"""CAE: the encoder encodes, others do the pretext task.

Half of the patches are hidden block by block. The encoder reads the visible ones and nothing else: no mask token ever enters it. A regressor,
blocks of cross-attention from one learned token with the position of each hidden patch, predicts what the encoder WOULD say of the hidden
patches; a decoder, self-attention among these predictions alone, says from them which visual tokens stood there:

    L = CE(decoder(z), codes)  +  2 | z - sg(encoder(x_hidden)) |^2,      z = regressor(encoder(x_visible))       (equation 1)

The second term keeps the predictions in the encoder's own space, so that decoder and regressor cannot do the encoder's work; the encoder reads the
hidden patches as it reads the visible ones, on the complementary mask and without a gradient. The features of a patch are meant to be read by
attention: the attentive probe is this paper's exam (`polysense exam attentive_probe`).

The presets `v2` have CLIP's features for codes, told of hidden and of visible patches, by their cosine (Zhang et al. 2022, CAE v2).
"""
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polysense.archetypes.masked_model import MaskedModel
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, Start, ViewPlan, final
from polysense.decoders.codes import CodeTarget
from polysense.decoders.dvae import DVAECodec, DVAEEncoder
from polysense.decoders.features import FeatureTarget
from polysense.decoders.regressor import LatentRegressor, RegressorBlock
from polysense.decoders.vq_codec import small_codec
from polysense.mechanisms.aligned import AlignedTarget
from polysense.mechanisms.mask_sampler import BlockMask
from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.head import Linear, LinearBias, Nothing
from polysense.nn.init import RescaledInit, XavierInit
from polysense.nn.norm import LayerNorm
from polysense.nn.transformer import Transformer
from polysense.objectives.codes import aligned
from polysense.objectives.masked import masked_cosine, masked_mse
from polysense.towers.clip import body, image_tower
from polysense.towers.vit import ViT
from polysense.weights import cae

card = Card(
    name="CAE", paper="Chen et al., Context Autoencoder for Self-Supervised Representation Learning, IJCV 2024", arxiv="2202.03026", year=2024,
    says="Learns pictures without labels by predicting its own features of hidden patches, and from these which visual tokens stood there.",
    needs=("image",), can=("encode_image",), official="lxtGH/CAE",
)

PARAMETERS = 202_467_712                     # ViT-B/16 85.7M, regressor and decoder 63.0M, the frozen encoder of the tokenizer 53.8M

weights = {"official": cae.LAYOUT}

MEAN, STD, HALF = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.5, 0.5, 0.5)
LEARNS = ("encoder.*", "decoder.*")


@final
class CAE(MaskedModel):
    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedModel.Config):
        visible: Spec = field(default_factory=Nothing.Config)       # v2: from a visible patch to what the teacher says of it

    def __init__(self, c: Config):
        super().__init__(c)
        self.visible = c.visible.build()

    def losses(self, batch: Batch) -> Losses:
        """Codes of hidden patches, and the encoder's own features of them."""
        image = batch["image"]
        return Losses(**aligned(*self.pairs(image, self.masking(image))))

    def imitate(self, batch: Batch) -> Losses:
        """v2: a frozen teacher's features, of hidden patches by the decoder, of visible ones by a dense layer. UserError without that layer."""
        if isinstance(self.visible, Nothing):
            raise UserError("this CAE has no head for visible patches", "take the preset tiny_v2 or paper_v2, or set config.visible")
        image = batch["image"]
        masking = self.masking(image)
        seen, truth = self.see(image, masking), self.target.truth.whole(image)
        said, latents = self.decoder(seen, masking)
        return Losses(hidden=masked_cosine(said, truth[masking.mask]),
                      visible=masked_cosine(self.visible(seen[:, self.encoder.prefix:]), masking.at_visible(truth)),
                      align=masked_mse(latents, self.target.features(image, masking)))

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm: the mean of all patch tokens, none hidden."""
        return self.features(image)

    @torch.no_grad()
    def alignment(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image [B,3,H,W] -> cosine of what is predicted of hidden patches and what the encoder says of them, mean over patches [B]; and the same
        with the features of the next picture of the batch."""
        masking = self.masking(image)
        latents, aim = self.decoder.regress(self.see(image, masking), masking), self.target.features(image, masking)
        own, other = (torch.cosine_similarity(latents, a, dim=-1).mean(1) for a in (aim, aim.roll(1, 0)))
        return own, other


def blocks(width: int, depth: int, heads: int, scale: float, drop_path: float = 0.0, init: Spec | None = None) -> Transformer.Config:
    norm = LayerNorm.Config(eps=1e-6)
    return Transformer.Config(width=width, depth=depth, heads=heads, norm=norm, drop_path=drop_path, init=init or XavierInit.Config(),
                              block=PreNorm.Config(attn=Attention.Config(bias="q v out"), norm=norm, layer_scale=scale))


def preset(size: int, patch: int, encoder: Transformer.Config, decoder: Transformer.Config, regressor: int, scale: float, hidden: int, least: int,
           truth: Spec, starts: tuple[Start, ...], data: str, view: float, stage: Stage) -> Preset:
    return Preset(
        data=data, starts=starts, stages=(stage,),
        feed=Feed(image=ImagePlan(size=size, mean=MEAN, std=STD), train_image=ViewPlan(size=size, scale=(view, 1.0), flip=0.5)),
        config=CAE.Config(
            encoder=ViT.Config(image_size=size, patch=patch, body=encoder, pool="mean", position="sincos"),
            sampler=BlockMask.Config(hidden=hidden, least=least, fill="exact", tries=30), target=AlignedTarget.Config(truth=truth),
            decoder=LatentRegressor.Config(body=decoder, depth=regressor, drop_path=decoder.drop_path, init=decoder.init,
                                           block=RegressorBlock.Config(layer_scale=scale))))


ALIGN = (("align", 2.0),)


def tiny() -> Preset:
    """64 px in patches of 8, half of them hidden; the codes are those of a VQ-VAE of the `small` kind on a copy of 32 px, as BEiT's. Branches begin
    at full scale."""
    return preset(64, 8, blocks(96, 4, 3, 1.0), blocks(96, 2, 3, 1.0), 2, 1.0, 32, 6,
                  CodeTarget.Config(codec=small_codec(), size=32, mean=MEAN, std=STD, codec_mean=HALF, codec_std=HALF),
                  (Start(into="target.truth.codec", from_="vq_vae", take="codec", preset="small"),), "scenes", 0.4, Stage(
                      objective=CAE.losses, trainable=LEARNS, weights=ALIGN, steps=500, batch_size=64,
                      optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=50, clip=3.0)))


def paper() -> Preset:
    """ViT-B/16 on ImageNet-1k, 800 epochs of batch 2048, four blocks of regressor and decoder, 98 of 196 patches hidden (section 4.1 and the released
    script)."""
    epoch, depths = 1_281_167 // 2048, blocks(768, 4, 12, 0.1, 0.1)
    return preset(224, 16, blocks(768, 12, 12, 0.1, 0.1), depths, 4, 0.1, 98, 16,
                  CodeTarget.Config(codec=DVAECodec.Config(encoder=DVAEEncoder.Config(codes=8192), decoder=None), size=112, mean=MEAN, std=STD),
                  (Start(into="target.truth.codec.encoder", from_="dalle_dvae", take="codec.encoder", preset="paper"),), "imagenet1k", 0.08, Stage(
                      objective=CAE.losses, trainable=LEARNS, weights=ALIGN, steps=800 * epoch, batch_size=2048,
                      optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=20 * epoch, clip=3.0, final=1e-5 / 1.5e-3)))


def large() -> Preset:
    """ViT-L/16, 1600 epochs; scales begin at 1e-5, linears that write to the trunk divided by sqrt(2 l)."""
    epoch, init = 1_281_167 // 2048, RescaledInit.Config()
    return paper().but(**{
        "config.encoder.body": blocks(1024, 24, 16, 1e-5, 0.1, init), "config.decoder.body": blocks(1024, 4, 16, 1e-5, 0.1, init),
        "config.decoder.init": init, "config.decoder.block.layer_scale": 1e-5, "stages.0.steps": 1600 * epoch, "stages.0.optim.warmup": 40 * epoch})


def imitating(base: Preset, teacher: ViT.Config, width: int, start: str) -> Preset:
    """CAE v2: CLIP's projected patch features in place of codes, of visible patches too."""
    plan = ImagePlan(size=teacher.image_size)
    truth = FeatureTarget.Config(tower=teacher, head=Linear.Config(into=teacher.width, out=width), width=width, size=plan.size, mean=MEAN, std=STD,
                                 tower_mean=plan.mean, tower_std=plan.std)
    starts = tuple(Start(into=f"target.truth.{a}", from_="clip", take=b, preset=start) for a, b in (("tower", "vision"), ("head", "image_head")))
    head = LinearBias.Config(into=base.config.encoder.width, out=width)  # type: ignore[attr-defined]
    return base.but(starts=starts, **{"config.target.truth": truth, "config.visible": head, "stages.0.objective": CAE.imitate,
                                      "stages.0.trainable": (*LEARNS, "visible.*")})


def tiny_v2() -> Preset:
    """Taught by `clip` tiny_vit."""
    return imitating(tiny(), image_tower(64, 8, body(192, 6, 3)), 192, "tiny_vit")


def paper_v2() -> Preset:
    """Taught by CLIP ViT-B/16; what CAE v2 does not say is CAE's."""
    return imitating(paper(), image_tower(224, 16, body(768, 12, 12)), 512, "vit_b_16")
