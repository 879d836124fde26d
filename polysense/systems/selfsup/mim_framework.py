"""Masked image modelling as one sentence: a student that does not see all of a picture says what a teacher says who does.

    min over student of   l( head(student(mask(x))),  norm(teacher(x)) )                                          (section 2.4.2)

Five slots, and everything that goes by a name of its own is a choice of what stands in them:
  teacher and norm   `target`: the pixels themselves (plain, or standardised patch by patch), histograms of gradients (unit length in each cell), the
                     spectrum, codes of a frozen tokenizer (argmax: VQ-VAE, dVAE, VQ-KD), patch features of a frozen CLIP or DINO (as they are, of
                     unit length or layer-normed), an average of the student (layers normed, averaged, normed), the student on the hidden patches
  student            `encoder`, of pictures or of clips, `sampler` (uniform, cells, blocks, tubes) and `hide`: hidden patches dropped, or replaced by
                     a token
  head               `decoder`: a linear layer, PixelShuffle, a transformer, two of them, a regressor and a decoder
  loss               `loss`: mse, l1, smooth_l1, cosine, ce, frequency, geminated, aligned
The teacher has no gradient; one that follows the student moves after the step. With codes there may be a second head, BEiT v2's: `aggregate`, blocks
that have to name them from the last class token and the patches of layer `early`, so that the class token learns the whole picture.

`target=hog` (and pixel, fourier, dvae, vqkd, clip, dino, ema) puts a teacher in, with the head and the loss that it needs, and leaves student, data
and plan as they are: `polysense compare mim_framework --vary target=pixel,hog,ema`. `method=mae` (and the others below) is that system itself: its
parts, its feed and its plan, under this objective. Pixels, HOG and spectra are low-level targets, codes and features high-level ones (`level`). Two
are no choice of these slots: iBOT, whose teacher judges by a head of its own and pictures as a whole besides, and BEVT, which has two students.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from polysense.archetypes.masked_model import MaskedModel, aggregated
from polysense.base.card import Card
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, Start, ViewPlan, final
from polysense.decoders.codes import CodeHead, CodeTarget
from polysense.decoders.features import FeatureTarget
from polysense.decoders.geminate import Geminated
from polysense.decoders.hog import HOGTarget
from polysense.decoders.pixels import GridPixels, PixelTarget
from polysense.decoders.regressor import LatentRegressor
from polysense.decoders.shuffle import ShuffleHead
from polysense.decoders.spectra import SpectrumHead, SpectrumTarget
from polysense.decoders.vq_codec import small_codec
from polysense.decoders.vqkd import UnitCodec
from polysense.mechanisms.followed import FollowedTarget
from polysense.mechanisms.mask_sampler import BlockMask, DropHidden, FillHidden
from polysense.mechanisms.teacher import Teacher
from polysense.nn.masking import Masking
from polysense.objectives.codes import aligned, masked_ce
from polysense.objectives.masked import masked_cosine, masked_mse
from polysense.objectives.regress import masked_l1, masked_smooth_l1
from polysense.objectives.spectrum import focal_frequency, geminated
from polysense.towers.clip import body, image_tower
from polysense.towers.shapes import plain_vit
from polysense.towers.video_vit import VideoViT

card = Card(
    name="MIM framework", paper="Li et al., Multimodal Foundation Models: From Specialists to General-Purpose Assistants, 2023",
    arxiv="2309.10020", year=2023, says="Masked image modelling with the teacher, the norm, the student, the head and the loss of your choice.",
    needs=("image|video", "video|image"), can=("encode_image", "reconstruct"),
)

PARAMETERS = 86_390_016                      # ViT-B/16 with its mask token 85.8M, and a head for pixels 768 x 768

MEAN, STD, HALF = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.5, 0.5, 0.5)
LEARNS = ("encoder.*", "hide.*", "decoder.*")
CODES, SPECTRA = (CodeTarget,), (SpectrumTarget,)
LOSSES: dict[str, Callable[[Any, Any], Tensor | dict[str, Tensor]]] = {
    "mse": masked_mse, "l1": masked_l1, "smooth_l1": masked_smooth_l1, "cosine": masked_cosine, "ce": masked_ce, "frequency": focal_frequency,
    "geminated": geminated, "aligned": aligned}


@final
class MIMFramework(MaskedModel):
    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedModel.Config):
        loss: str
        aggregate: Spec | None = None        # a Transformer.Config: blocks of the second head; None: there is none
        early: int = 0                       # the layer that lends it the patches

    def __init__(self, c: Config):
        super().__init__(c)
        if c.loss not in LOSSES:
            raise UserError(f"no loss={c.loss!r}", f"it is one of {', '.join(LOSSES)}")
        fits = {"ce": CODES, "frequency": SPECTRA, "geminated": (Geminated,), "aligned": (LatentRegressor,)}
        said = self.decoder if c.loss in ("geminated", "aligned") or isinstance(self.decoder, LatentRegressor) else self.target
        kind = next((k for k, parts in fits.items() if isinstance(said, parts)), "")
        if kind != (c.loss if c.loss in fits else ""):
            raise UserError(f"loss={c.loss} does not fit {type(self.decoder).__name__} and {type(self.target).__name__}",
                            f"it takes loss={kind}" if kind else
                            "ce compares codes, frequency spectra, geminated what two decoders draw, aligned what a regressor says")
        dropped, whole = isinstance(self.hide, DropHidden), isinstance(self.decoder, (CodeHead, ShuffleHead, SpectrumHead))
        if dropped == whole:
            lack = "without" if dropped else "with other tokens than"
            raise UserError(f"{type(self.hide).__name__} leaves {type(self.decoder).__name__} {lack} those it reads",
                            "one layer reads a token in every place (FillHidden), a transformer decoder puts its own there (DropHidden)")
        if isinstance(self.decoder, CodeHead) and type(self.target) is PixelTarget:
            raise UserError("a linear head says patches in the order of the grid, PixelTarget in that of the mask", "take GridPixels")
        if c.aggregate is not None and (c.loss != "ce" or not isinstance(self.hide, FillHidden) or not hasattr(self.encoder.body, "relative")):
            raise UserError(f"aggregate with loss={c.loss} on {type(self.encoder).__name__}",
                            "a second head names codes behind a tower with relative positions whose hidden patches are replaced")
        self.aggregate, self.early = None if c.aggregate is None else c.aggregate.build(), c.early
        self.judge, self.inputs = LOSSES[c.loss], ("video" if isinstance(self.encoder, VideoViT) else "image",)

    @property
    def level(self) -> str:
        """"low": the target is computed from the pixels by a formula; "high": a network that was trained says it."""
        return "low" if isinstance(self.target, (PixelTarget, HOGTarget, SpectrumTarget)) else "high"

    def losses(self, batch: Batch) -> Losses:
        pixels = batch[self.inputs[0]]
        masking = self.masking(pixels)
        if self.aggregate is not None:
            codes = self.target(pixels, masking)
            main, branch = (self.decoder(x, masking) for x in aggregated(self.encoder, self.aggregate, self.early, pixels, masking, self.hide.token))
            return Losses(predict=masked_ce(main, codes), cls=masked_ce(branch, codes))
        said = self.judge(*self.pairs(pixels, masking))
        return Losses(**said) if isinstance(said, dict) else Losses(predict=said)

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm: the encoder's pooled feature, nothing hidden."""
        return self.features(image)

    def reconstruct(self, image: Tensor, masking: Masking | None = None) -> Tensor:
        """image [B,3,H,W] -> the same with its hidden patches as drawn. UserError where the target is no picture, such as HOG or features."""
        masking = masking or self.masking(image)
        if isinstance(self.target, SpectrumTarget):
            return self.decoder.draw(self.see(image, masking))
        if not isinstance(self.target, PixelTarget):
            raise UserError(f"this model predicts {type(self.target).__name__.removesuffix('Target')}, which is no picture", "train target=pixel")
        drawn = getattr(self.decoder, "pixels", self.decoder)(self.see(image, masking), masking)
        return self.target.paint(image, masking, drawn, self.encoder.grid_of(image))


# -- what can stand in the slot `target`, everything else equal ------------------------------------------------------------------------------

def aimed(preset: Preset, target: Spec, loss: str, starts: tuple[Start, ...] = (), head: Spec | None = None) -> Preset:
    return preset.but(starts=starts, **{"config.target": target, "config.loss": loss, "config.decoder": head or CodeHead.Config()})


def side_of(preset: Preset) -> tuple[int, int]:
    """Pixels of the picture and of a patch."""
    encoder: Any = preset.config.encoder  # type: ignore[attr-defined]
    return encoder.image_size, encoder.patch


def pixel(preset: Preset) -> Preset:
    return aimed(preset, GridPixels.Config(patch=side_of(preset)[1]), "mse")


def hog(preset: Preset) -> Preset:
    patch = side_of(preset)[1]
    return aimed(preset, HOGTarget.Config(patch=patch, cell=patch // 2), "mse")


def fourier(preset: Preset) -> Preset:
    patch = side_of(preset)[1]
    return aimed(preset, SpectrumTarget.Config(patch=patch), "frequency", head=SpectrumHead.Config(patch=patch))


def dvae(preset: Preset) -> Preset:
    """64 codes of the VQ-VAE `small`, which quarters the side."""
    size, patch = side_of(preset)
    target = CodeTarget.Config(codec=small_codec(), size=size // patch * 4, mean=MEAN, std=STD, codec_mean=HALF, codec_std=HALF)
    return aimed(preset, target, "ce", (Start(into="target.codec", from_="vq_vae", take="codec", preset="small"),))


def vqkd(preset: Preset) -> Preset:
    """256 codes of BEiT v2's tokenizer `tiny_tokenizer`: 64 px in patches of 8."""
    size, patch = side_of(preset)
    codec = UnitCodec.Config(encoder=plain_vit(64, 8, 96, 3, 3), codes=256, width=16)
    target = CodeTarget.Config(codec=codec, size=size // patch * 8, mean=MEAN, std=STD, codec_mean=HALF, codec_std=HALF)
    return aimed(preset, target, "ce", (Start(into="target.codec", from_="beit_v2", take="codec", preset="tiny_tokenizer"),))


def clip(preset: Preset) -> Preset:
    """`clip` tiny_vit: 64 px in patches of 8, 192 numbers in the space of texts."""
    size, patch = side_of(preset)
    plan = ImagePlan(size=64)
    tower, head = image_tower(64, 8, body(192, 6, 3)), preset_of("clip", "tiny_vit").config.image_head  # type: ignore[attr-defined]
    target = FeatureTarget.Config(tower=tower, head=head, width=192, size=size // patch * 8, mean=MEAN, std=STD, tower_mean=plan.mean,
                                  tower_std=plan.std, norm="unit")
    return aimed(preset, target, "cosine", tuple(Start(into=f"target.{a}", from_="clip", take=b, preset="tiny_vit")
                                                 for a, b in (("tower", "vision"), ("head", "image_head"))))


def dino(preset: Preset) -> Preset:
    """`dino` tiny, its average: 32 px in patches of 4."""
    size, patch = side_of(preset)
    target = FeatureTarget.Config(tower=plain_vit(32, 4, 96, 4, 3), width=96, size=size // patch * 4, mean=MEAN, std=STD, tower_mean=MEAN,
                                  tower_std=STD, norm="layer")
    return aimed(preset, target, "mse", (Start(into="target.tower", from_="dino", take="teacher.module.backbone"),))


def ema(preset: Preset) -> Preset:
    """The average of the student itself over its upper half, as in data2vec."""
    depth = preset.config.encoder.body.depth  # type: ignore[attr-defined]
    teacher = Teacher.Config(momentum=0.99, final=0.999, mode="eval")
    return aimed(preset, FollowedTarget.Config(teacher=teacher, top=max(1, depth // 2)), "smooth_l1")


# -- the systems that have names: their own parts, feed and plan -----------------------------------------------------------------------------

SLOTS = ("encoder", "sampler", "hide", "decoder", "target", "aggregate", "early")
METHODS = {"mae": "mse", "simmim": "l1", "maskfeat": "mse", "ge2_ae": "geminated", "beit": "ce", "beit_v2": "ce", "mvp": "cosine", "eva": "cosine",
           "data2vec_vision": "smooth_l1", "cae": "aligned", "videomae": "mse", "mae_st": "mse"}


def method(preset: Preset, name: str) -> Preset:
    """The system `name` under this objective: its slots are its own values, so nothing can differ."""
    theirs = preset_of(name)
    slots: dict[str, Any] = {slot: getattr(theirs.config, slot) for slot in SLOTS if hasattr(theirs.config, slot)}
    return theirs.but(config=MIMFramework.Config(**slots, loss=METHODS[name]), **{"stages.0.objective": MIMFramework.losses})


MIMFramework.choices = {
    "target": {"pixel": pixel, "hog": hog, "fourier": fourier, "dvae": dvae, "vqkd": vqkd, "clip": clip, "dino": dino, "ema": ema},
    "method": {name: partial(method, name=name) for name in METHODS}}


def preset(size: int, encoder: Spec, hidden: int, least: int, data: str, stage: Stage) -> Preset:
    return pixel(Preset(
        data=data, stages=(stage,),
        feed=Feed(image=ImagePlan(size=size, mean=MEAN, std=STD), train_image=ViewPlan(size=size, scale=(0.4, 1.0), flip=0.5)),
        config=MIMFramework.Config(encoder=encoder, sampler=BlockMask.Config(hidden=hidden, least=least, fill="exact"), hide=FillHidden.Config(),
                                   decoder=CodeHead.Config(), target=GridPixels.Config(patch=1), loss="mse")))


def tiny() -> Preset:
    """64 px in patches of 8, of which 26 are hidden block by block; pixels."""
    return preset(64, plain_vit(64, 8, 96, 4, 3, pool="mean"), 26, 6, "scenes", Stage(
        objective=MIMFramework.losses, trainable=LEARNS, steps=500, batch_size=64, optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=50, clip=3.0)))


def paper() -> Preset:
    """ViT-B/16 at 224 px on ImageNet-1k with BEiT's blocks and plan."""
    epoch = 1_281_167 // 2048
    return preset(224, plain_vit(224, 16, 768, 12, 12, pool="mean"), 75, 16, "imagenet1k", Stage(
        objective=MIMFramework.losses, trainable=LEARNS, steps=800 * epoch, batch_size=2048,
        optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=10 * epoch, clip=3.0)))
