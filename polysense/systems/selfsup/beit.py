"""BEiT: BERT for pictures. Hide patches, and let the others say which visual tokens stood there.

One crop has two views: image patches for a ViT, and a copy of half the side whose frozen discrete VAE gives a code z_i for every patch (the
same grid). About 40 percent of the patches are hidden block by block; their embeddings are replaced by one learned token, all positions pass
the encoder, and at hidden positions a softmax names the code:

    max  E_M  sum over i in M of  log softmax(W h_i + b)[z_i]                                                     (equation 2)

Positions are known through relative biases alone: one table for all layers, with three extra rows for the class token. Fine-tuning gives each
layer its own copy, pools the mean of the patches behind a norm, and lowers learning rates along the depth. Queries and values have a bias, keys
none; each branch has a learned scale; linears that write to the residual stream of layer l start divided by sqrt(2 l).
"""
from dataclasses import dataclass

from torch import Tensor

from polysense.archetypes.classifier import Classifier
from polysense.archetypes.masked_model import MaskedModel
from polysense.base.card import Card
from polysense.base.system import AugmentPlan, Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, Start, ViewPlan, final
from polysense.decoders.codes import CodeHead, CodeTarget
from polysense.decoders.dvae import DVAECodec, DVAEEncoder
from polysense.decoders.vq_codec import small_codec
from polysense.mechanisms.mask_sampler import BlockMask, FillHidden
from polysense.nn.block import PreNorm
from polysense.nn.head import NormLinear
from polysense.nn.relative import BiasedAttention, BiasedTransformer
from polysense.nn.transformer import Transformer
from polysense.objectives.classify import softmax_ce
from polysense.objectives.codes import masked_ce
from polysense.towers.beit import BeitTower, shared_bias
from polysense.weights import beit

card = Card(
    name="BEiT", paper="Bao et al., BEiT: BERT Pre-Training of Image Transformers, ICLR 2022",
    arxiv="2106.08254", year=2022, says="Learns pictures without labels by naming the visual tokens of hidden patches.",
    needs=("image", "label|image"), can=("encode_image",), official="microsoft/unilm",
)

PARAMETERS = 145_752_016                     # ViT-B/16 with its token head 92.0M, and the frozen encoder of the tokenizer 53.8M

weights = {"hf": beit.HF, "unilm": beit.UNILM, "hf_classifier": beit.HF_CLASSIFIER}

MEAN, STD, HALF = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.5, 0.5, 0.5)


@final
class BEiT(MaskedModel):
    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedModel.Config):
        pass

    def losses(self, batch: Batch) -> Losses:
        image = batch["image"]
        return Losses(codes=masked_ce(*self.pairs(image, self.masking(image))))

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm: the mean of all patch tokens, none hidden."""
        return self.features(image)


@final
class BEiTClassifier(Classifier):
    """The fine-tuned form."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Classifier.Config):
        smoothing: float = 0.1

    def __init__(self, c: Config):
        super().__init__(c)
        self.smoothing = c.smoothing

    def losses(self, batch: Batch) -> Losses:
        return Losses(label=softmax_ce(self.classify(batch["image"]), batch["label"], self.smoothing))


def finer(base: BeitTower.Config, drop_path: float) -> BeitTower.Config:
    """Fine-tuning: a table for each layer, the norm moves behind the pooling."""
    body = base.body
    assert isinstance(body, BiasedTransformer.Config) and isinstance(body.block, PreNorm.Config)
    attn = BiasedAttention.Config(bias="q v out", relative=body.relative)
    return base.but(body=Transformer.Config(width=body.width, depth=body.depth, heads=body.heads, init=body.init, norm=None, drop_path=drop_path,
                                            block=body.block.but(attn=attn)))


def preset(size: int, encoder: BeitTower.Config, hidden: int, least: int, target: CodeTarget.Config, start: Start, data: str, scale: float,
           jitter: float, stage: Stage) -> Preset:
    view = ViewPlan(size=size, scale=(scale, 1.0), flip=0.5, jitter=jitter, jitter_by=(0.4, 0.4, 0.4, 0.0))
    return Preset(
        data=data, starts=(start,), stages=(stage,), feed=Feed(image=ImagePlan(size=size, mean=target.mean, std=target.std), train_image=view),
        config=BEiT.Config(encoder=encoder, sampler=BlockMask.Config(hidden=hidden, least=least), hide=FillHidden.Config(),
                           decoder=CodeHead.Config(), target=target))


LEARNS = ("encoder.*", "hide.*", "decoder.*")


def tiny() -> Preset:
    """64 px in 8x8 patches; the codes are those of a VQ-VAE of the `small` kind on a copy of 32 px. Few steps: branches start at full scale, and
    the table of positions, which has to grow from zero, learns faster than the rest."""
    return preset(64, shared_bias(64, 8, 96, 4, 3, 1.0, 0.0), 25, 6,
                  CodeTarget.Config(codec=small_codec(), size=32, mean=MEAN, std=STD, codec_mean=HALF, codec_std=HALF),
                  Start(into="target.codec", from_="vq_vae", take="codec", preset="small"), "scenes", 0.4, 0.8, Stage(
                      objective=BEiT.losses, trainable=LEARNS, steps=500, batch_size=64,
                      optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=50, clip=3.0, lr_scale=(("*.relative.table", 20.0),))))


def paper() -> Preset:
    """ViT-B/16 on ImageNet-1k, 800 epochs of batch 2048 (appendix G); codes of DALL-E's tokenizer at 112 px. The colours of every picture are
    jittered, and pixels go to [-1, 1], as released."""
    epoch = 1_281_167 // 2048
    target = CodeTarget.Config(codec=DVAECodec.Config(encoder=DVAEEncoder.Config(codes=8192), decoder=None), size=112, mean=HALF, std=HALF)
    return preset(224, shared_bias(224, 16, 768, 12, 12, 0.1, 0.1), 75, 16, target,
                  Start(into="target.codec.encoder", from_="dalle_dvae", take="codec.encoder", preset="paper"), "imagenet1k", 0.08, 1.0, Stage(
                      objective=BEiT.losses, trainable=LEARNS, steps=800 * epoch, batch_size=2048,
                      optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=10 * epoch, clip=3.0, final=1e-5 / 1.5e-3)))


def classifier(base: Preset, classes: int, from_: str, drop_path: float, view: ViewPlan, stage: Stage) -> Preset:
    encoder: Spec = base.config.encoder  # type: ignore[attr-defined]
    assert isinstance(encoder, BeitTower.Config)
    return base.but(starts=(Start(into="backbone", from_="beit", take="encoder", preset=from_),), stages=(stage,),
                    config=BEiTClassifier.Config(backbone=finer(encoder, drop_path), head=NormLinear.Config(into=encoder.width, out=classes)),
                    **{"feed.train_image": view})


def finetune() -> Preset:
    """ImageNet-1k at 224 px, 100 epochs of batch 1024 with layer-wise decay, RandAugment and erasing (appendix H): per-layer tables start as copies
    of the shared one."""
    epoch = 1_281_167 // 1024
    return classifier(paper(), 1000, "paper", 0.1, AugmentPlan(size=224, scale=(0.08, 1.0), flip=0.5), Stage(
        objective=BEiTClassifier.losses, steps=100 * epoch, batch_size=1024,
        optim=Optim(lr=4e-3, weight_decay=0.05, layer_decay=0.65, warmup=20 * epoch)))


def intermediate() -> Preset:
    """Supervised tuning on ImageNet-22k before fine-tuning (section 2.6): 90 epochs of batch 4096."""
    base, epoch = finetune(), 14_197_122 // 4096
    return base.but(data="imagenet22k", **{"config.head.out": 21_841, "stages.0.steps": 90 * epoch, "stages.0.batch_size": 4096,
                                           "stages.0.optim.layer_decay": 0.75, "stages.0.optim.warmup": 5 * epoch})


def tiny_finetune() -> Preset:
    """The encoder of `tiny` on 500 labelled scenes of fifteen shapes."""
    return classifier(tiny(), 15, "tiny", 0.0, ViewPlan(size=64, scale=(0.6, 1.0), flip=0.5), Stage(
        objective=BEiTClassifier.losses, steps=200, batch_size=64, optim=Optim(lr=1e-3, weight_decay=0.05, layer_decay=0.75, warmup=20))).but(
            data="scenes:single?n=500")
