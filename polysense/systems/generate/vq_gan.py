"""VQ-GAN: short grids of codes that decode to sharp pictures, and a transformer that writes such grids.

The codec is a VQ-VAE whose likelihood is replaced by what a person and a critic would say of the picture (section 3.1):

    L = |x - x'| + LPIPS(x, x') + ||sg(e_k) - z_e||^2 + beta ||e_k - sg(z_e)||^2 - lambda mean D(x')
    L_D = (max(0, 1 - D(x)) + max(0, 1 + D(x'))) / 2
    lambda = 0.8 ||grad_W (|x - x'| + LPIPS)|| / (||grad_W mean D(x')|| + 1e-4),   W the decoder's last layer            (equation 7)

D judges patches. lambda is a number, no gradient passes through it. The critic joins after `critic_from` steps; until then the loss does not know
it. Critic and codec have an optimiser each and both take a step on every batch (`archetypes.generator.alternate`). beta stands at the codebook's
term, as in the released code; `beta_on="commitment"` is the form of the paper it cites. LPIPS is read from published files (`perceptual_files`);
without them the distance is that of this library's own VGG, every channel counting alike. In the Gumbel variant a code is drawn from a softmax and
the codes' two terms give way to a small divergence from even use.

Then the codec is frozen and a causal transformer learns the grids in raster order (section 3.2); where there is a `condition`, a second codec of
which the codes stand in front, it enlarges: the second codec reads the picture averaged over squares of `coarse` pixels. Drawing takes the `top_k`
likeliest codes of each place; larger grids are written through a sliding window.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.archetypes.adversarial_codec import AdversarialCodec
from polysense.archetypes.generator import alternate
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import After, Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, Start, ViewPlan, final
from polysense.decoders.code_writer import CodeWriter
from polysense.decoders.gumbel import GumbelQuantizer
from polysense.decoders.patch_critic import PatchCritic, balance
from polysense.decoders.perceptual import Perceptual, vgg_rows
from polysense.decoders.res_codec import ResDecoder, ResEncoder
from polysense.decoders.vq_codec import VectorQuantizer, VQCodec, check_grid
from polysense.nn.norm import GroupNorm
from polysense.nn.transformer import Transformer
from polysense.objectives.codes import codebook_loss, commitment_loss, kl_to_uniform, masked_ce
from polysense.weights import vq_gan as layouts

card = Card(
    name="VQ-GAN", paper="Esser et al., Taming Transformers for High-Resolution Image Synthesis, CVPR 2021",
    arxiv="2012.09841", year=2021, says="Turns a picture into a short grid of codes that decodes to a sharp picture, and writes new ones.",
    needs=("image",), can=("sample_image", "reconstruct", "encode_codes", "decode_codes"), official="CompVis/taming-transformers",
)

PARAMETERS = 429_684_676                     # codec 76.1M, critic 2.8M, VGG-16 14.7M and 1,472 weights, transformer 336.1M; no published total

weights = {"taming": layouts.TAMING, "diffusers": layouts.DIFFUSERS}


@final
class VQGAN(AdversarialCodec):
    @dataclass(frozen=True, kw_only=True)
    class Config(AdversarialCodec.Config):
        codec: VQCodec.Config
        critic_weight: float = 0.8           # beside the balance of gradients
        beta: float = 0.25
        beta_on: str = "codebook"            # the released code; "commitment": the paper's sum
        divergence: float = 5e-4             # weight of the Gumbel variant's divergence
        top_k: int = 100                     # codes of each place that drawing chooses among; 0: all
        condition: Spec | None = None        # a second codec, frozen: what it says of a coarse picture stands before the codes
        coarse: int = 4                      # pixels along a side of what the second codec sees as one

    def __init__(self, c: Config):
        super().__init__(c)
        if c.beta_on not in ("commitment", "codebook"):
            raise UserError(f"no beta_on={c.beta_on!r}", "it is 'codebook' (the released code) or 'commitment'")
        self.condition = c.condition.build() if c.condition is not None else None
        self.factors = (1.0, c.beta) if c.beta_on == "commitment" else (c.beta, 1.0)
        self.critic_weight, self.divergence, self.top_k, self.coarse = c.critic_weight, c.divergence, c.top_k, c.coarse

    def rebuild(self, batch: Batch) -> tuple[Losses, Tensor]:
        image = batch["image"]
        drawn, encoded, quantized = self.codec(image)
        losses = Losses(detail=(image - drawn).abs().mean() + self.perceptual_weight * self.perceptual(image, drawn).mean())
        if isinstance(self.codec.quantizer, GumbelQuantizer):
            losses["kl"] = self.divergence * kl_to_uniform(self.codec.quantizer.logits(encoded)).mean()
        else:
            losses["codebook"] = self.factors[0] * codebook_loss(encoded, quantized.vectors)
            losses["commit"] = self.factors[1] * commitment_loss(encoded, quantized.vectors)
        return losses.keeping(encoded=encoded, ids=quantized.ids), drawn

    def weigh(self, losses: Losses, fooled: Tensor) -> Tensor:
        """Equation 7."""
        return self.critic_weight * balance(losses["detail"], fooled, self.codec.decoder.last)

    def before(self, image: Tensor) -> Tensor | None:
        """image [B,3,H,W] -> the second codec's numbers of the coarse picture [B,h,w]; None where there is no second codec."""
        if self.condition is None:
            return None
        check_grid(image, 3, self.coarse)
        return self.condition.ids(F.interpolate(F.avg_pool2d(image, self.coarse), scale_factor=float(self.coarse)))

    def fit_prior(self, batch: Batch) -> Losses:
        """-log p(codes | what stands before them), nats a code, on the grids of the frozen codec."""
        with torch.no_grad():
            ids, before = self.codec.ids(batch["image"]), self.before(batch["image"])
        return Losses(codes=masked_ce(self.prior(ids, before if before is None else before.flatten(1)), ids))

    @torch.no_grad()
    def after_step(self, after: After) -> None:
        if isinstance(self.codec.quantizer, GumbelQuantizer):
            if "ids" in after.keep:
                self.met += 1
                self.codec.quantizer.cool(after.progress)
        else:
            super().after_step(after)

    @torch.no_grad()
    def sample_image(self, count: int, *, steps: int) -> Tensor:
        """New pictures [count,3,H,W]. steps: not used, there is one code after the other. UserError where the prior wants a picture first."""
        if self.condition is not None:
            raise UserError("this VQ-GAN enlarges pictures", "give it one: VQGAN.enlarge(image)")
        return self.codec.decode(self.prior.sample(count, top_k=self.top_k))

    @torch.no_grad()
    def enlarge(self, image: Tensor) -> Tensor:
        """image [B,3,H,W], of which no more counts than the means of squares -> a drawn one [B,3,H,W] that could have had them. Larger pictures than
        those of training are written through a sliding window. UserError where there is no second codec."""
        if self.condition is None:
            raise UserError("this VQ-GAN has no second codec", "train the preset `enlarging`, or give config.condition")
        before = self.before(image)
        h, w = (n // self.codec.stride for n in image.shape[2:])
        return self.codec.decode(self.prior.sample(len(image), before, grid=(h, w), top_k=self.top_k))


def codec(widths: tuple[int, ...], depth: int, maps: int, codes: int, dim: int, *, attend: tuple[int, ...] = (), groups: int = 32,
          idle: float = 0.0) -> VQCodec.Config:
    norm = GroupNorm.Config(groups=groups, eps=1e-6)
    ladder = dict(widths=widths, depth=depth, maps=maps, attend=attend, code=dim, norm=norm)
    return VQCodec.Config(encoder=ResEncoder.Config(**ladder), decoder=ResDecoder.Config(**ladder),  # type: ignore[arg-type]
                          quantizer=VectorQuantizer.Config(codes=codes, width=dim, idle=idle))


def writer(codes: int, side: int, width: int, depth: int, heads: int, **front: int) -> CodeWriter.Config:
    return CodeWriter.Config(codes=codes, side=side, body=Transformer.Config(width=width, depth=depth, heads=heads), **front)


HALF, BETAS = (0.5, 0.5, 0.5), (0.5, 0.9)


def feed(size: int, scale: tuple[float, float] = (0.9, 1.0)) -> Feed:
    return Feed(image=ImagePlan(size=size, mean=HALF, std=HALF), train_image=ViewPlan(size=size, scale=scale, flip=0.5))


def tiny_codec() -> VQCodec.Config:
    return codec((16, 32, 64), 1, 32, 256, 16, attend=(2,), groups=8, idle=0.05)


def tiny() -> Preset:
    """32 px to 8x8 codes of 256. The critic joins behind the first stage; the perceptual network is the VGG of `vgg` tiny, all channels alike, which
    weigh more than LPIPS' learned weights would let them: hence `perceptual_weight`. Codes that lie idle are born again on encoder outputs, which the
    paper does not do."""
    optim = Optim(name="adam", lr=2e-3, betas=BETAS, warmup=20, clip=1.0, final=0.1)
    return Preset(
        data="scenes", feed=feed(32), starts=(Start(into="perceptual", from_="vgg", take="backbone"),),
        config=VQGAN.Config(codec=tiny_codec(), prior=writer(256, 8, 96, 4, 4),
                            critic=PatchCritic.Config(width=16, depth=2), perceptual_weight=0.1,
                            perceptual=Perceptual.Config(rows=vgg_rows((1, 1, 2, 2, 2), base=8), seen=(0, 1, 3, 5, 7))),
        stages=(Stage(name="codec", objective=VQGAN.compress, trainable=("codec.*",), steps=300, batch_size=16, optim=optim),
                Stage(name="sharpen", objective=VQGAN.losses, run=alternate, trainable=("codec.*", "critic.*"), steps=200, batch_size=16,
                      optim=optim.but(lr=5e-4, schedule="constant")),
                Stage(name="prior", objective=VQGAN.fit_prior, trainable=("prior.*",), steps=400, batch_size=32,
                      optim=Optim(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, warmup=20, clip=1.0))))


def enlarging() -> Preset:
    """tiny, which reads the codes of a coarse picture first; the second codec is the tiny one's."""
    base, same = tiny(), tiny_codec()
    return base.but(starts=tuple(Start(into=into, from_="vq_gan", take=take) for into, take in (("codec", "codec"), ("condition", "codec"))),
                    stages=base.stages[2:], **{"config.condition": same, "config.coarse": 8, "config.prior": writer(
                        256, 8, 96, 4, 4, front=64, told=256)})


def paper() -> Preset:
    """ImageNet at 256 px to 16x16 codes of 16,384 (f = 16), the critic from step 250,001 on; the transformer has 24 layers of 1,024 (table 7, 8). The
    learning rate is 4.5e-6 for each picture of a batch."""
    adam = Optim(name="adam", lr=4.5e-6 * 12, betas=BETAS, schedule="constant")
    return Preset(
        data="imagenet1k", feed=feed(256, (0.5, 1.0)), starts=(Start(into="perceptual", from_="vgg", take="backbone", preset="paper"),),
        config=VQGAN.Config(codec=codec((128, 128, 256, 256, 512), 2, 256, 16_384, 256, attend=(4,)), prior=writer(16_384, 16, 1024, 24, 16),
                            critic=PatchCritic.Config(), critic_from=250_001, perceptual=Perceptual.Config()),
        stages=(Stage(name="codec", objective=VQGAN.losses, run=alternate, trainable=("codec.*", "critic.*"), steps=1_000_000, batch_size=12,
                      optim=adam),
                Stage(name="prior", objective=VQGAN.fit_prior, trainable=("prior.*",), steps=300_000, batch_size=448,
                      optim=Optim(lr=4.5e-6 * 448, betas=(0.9, 0.95), weight_decay=0.01, schedule="constant"))))


def gumbel() -> Preset:
    """The variant whose codes are drawn: 256 px to 32x32 codes of 8,192 (f = 8)."""
    return paper().but(**{"config.codec": codec((128, 128, 256, 512), 2, 256, 8192, 256, attend=(3,)).but(
        quantizer=GumbelQuantizer.Config(codes=8192, width=256, temperature=(0.9, 1e-6))), "config.divergence": 1e-8,
        "config.prior": writer(8192, 32, 1024, 24, 16)})
