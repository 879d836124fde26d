"""VQ-VAE: an autoencoder whose bottleneck is a grid of numbers out of a codebook.

    k = argmin_j ||z_e(x) - e_j||,   z_q = e_k                                                                    (equations 1 and 2)
    L = -log p(x | z_q) + ||sg(z_e) - e_k||^2 + beta ||z_e - sg(e_k)||^2                                          (equation 3)

The choice has no gradient, so the decoder's gradient at z_q is handed to z_e unchanged (straight-through). Thus the encoder is moved by the
first and third term, the codebook by the second alone, the decoder by the first alone. With `decay` the second term is left out and each
code follows the running mean of the vectors that chose it (appendix A.1): it moves in `after_step`. The prior over codes is uniform while
the codec trains (its KL is a constant); afterwards an autoregressive prior, a gated PixelCNN, is fitted to the grids of the frozen codec,
and sampling it draws new pictures. Codes that lie idle are born again on encoder outputs, which the paper does not do.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.archetypes.image_codec import ImageCodec
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import After, Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, ViewPlan, final
from polysense.decoders.pixelcnn import PixelCNN
from polysense.decoders.vq_codec import ConvDecoder, ConvEncoder, VectorQuantizer, VQCodec
from polysense.objectives.codes import codebook_loss, commitment_loss, masked_ce
from polysense.objectives.spread import gather

card = Card(
    name="VQ-VAE", paper="van den Oord et al., Neural Discrete Representation Learning, NeurIPS 2017",
    arxiv="1711.00937", year=2017, says="Turns a picture into a small grid of code numbers and back, so that it can be modelled like a sentence.",
    needs=("image",), can=("sample_image", "reconstruct", "encode_codes", "decode_codes"), official="google-deepmind/sonnet",
)

PARAMETERS = 19_559_619                      # the codec of section 4.1 (4.9M) and a gated PixelCNN of 20 layers of 128 (14.6M); no published total


@final
class VQVAE(ImageCodec):
    @dataclass(frozen=True, kw_only=True)
    class Config(ImageCodec.Config):
        codec: VQCodec.Config
        prior: Spec
        beta: float = 0.25
        beta_on: str = "commitment"          # "codebook": what much copied code does (VQ-GAN and its heirs) in place of the paper
        variance: float = 0.25               # of the pixels, about: the likelihood is Gaussian with half of it (-log p = ||x - x'||^2 / variance)

    def __init__(self, c: Config):
        super().__init__(c)
        if c.beta_on not in ("commitment", "codebook"):
            raise UserError(f"no beta_on={c.beta_on!r}", "it is 'commitment' (the paper) or 'codebook'")
        if c.beta_on == "codebook" and self.codec.quantizer.decay is not None:
            raise UserError("beta_on='codebook' has no codebook term to weigh", "with decay the codebook moves by running means")
        self.prior, self.variance = c.prior.build(), c.variance
        self.factors = (1.0, c.beta) if c.beta_on == "commitment" else (c.beta, 1.0)

    def losses(self, batch: Batch) -> Losses:
        """Equation 3, each term a mean over its numbers."""
        image = batch["image"]
        out, encoded, quantized = self.codec(image)
        terms = Losses(reconstruct=F.mse_loss(out, image) / self.variance, commit=self.factors[1] * commitment_loss(encoded, quantized.vectors))
        if self.codec.quantizer.decay is None:
            terms["codebook"] = self.factors[0] * codebook_loss(encoded, quantized.vectors)
        return terms.keeping(encoded=encoded, ids=quantized.ids)

    def fit_prior(self, batch: Batch) -> Losses:
        """-log p(codes) of the prior, nats a code, on the grids of the frozen codec."""
        with torch.no_grad():
            ids = self.codec.ids(batch["image"])
        return Losses(codes=masked_ce(self.prior(ids), ids))

    @torch.no_grad()
    def after_step(self, after: After) -> None:
        if "ids" in after.keep:
            self.codec.quantizer.move(gather(after.keep["encoded"]), gather(after.keep["ids"]), after.step)

    @torch.no_grad()
    def sample_image(self, count: int, *, steps: int) -> Tensor:
        """New pictures [count,3,H,W]: code grids drawn from the prior, decoded. steps: not used, there is one code after the other."""
        return self.codec.decode(self.prior.sample(count))


def codec(codes: int, dim: int, width: int, hidden: int, halvings: int, decay: float | None, idle: float, std: float | None = None) -> VQCodec.Config:
    return VQCodec.Config(
        encoder=ConvEncoder.Config(width=width, hidden=hidden, out=dim, halvings=halvings),
        quantizer=VectorQuantizer.Config(codes=codes, width=dim, decay=decay, idle=idle, std=std),
        decoder=ConvDecoder.Config(into=dim, width=width, hidden=hidden, doublings=halvings))


HALF = (0.5, 0.5, 0.5)


def tiny() -> Preset:
    """64 px to 16x16 codes of 256, codebook by running means (of few steps, so they forget faster than the paper's 0.99)."""
    return Preset(
        data="scenes", feed=Feed(image=ImagePlan(size=64, mean=HALF, std=HALF), train_image=ViewPlan(size=64, flip=0.5)),
        config=VQVAE.Config(codec=codec(256, 16, 64, 32, 2, decay=0.9, idle=0.05, std=0.5),
                            prior=PixelCNN.Config(codes=256, width=48, depth=6, side=16)),
        stages=(Stage(name="codec", objective=VQVAE.losses, trainable=("codec.*",), steps=800, batch_size=16,
                      optim=Optim(name="adam", lr=2e-3, warmup=20, final=0.1)),
                Stage(name="prior", objective=VQVAE.fit_prior, trainable=("prior.*",), steps=400, batch_size=16,
                      optim=Optim(name="adam", lr=1e-3, warmup=20))))


def small() -> Preset:
    """32 px to 8x8 codes of 64: the targets of tiny masked models and the words of tiny generators. The prior is left out of its training."""
    base = tiny().but(**{"config.codec.quantizer.codes": 64, "config.prior.codes": 64, "config.prior.side": 8,
                         "feed.image.size": 32, "feed.train_image.size": 32})
    return base.but(stages=base.stages[:1])


def paper() -> Preset:
    """ImageNet at 128 px to 32x32 codes of 512 (section 4.1); the width of a code is not given, 64 is that of the authors' code."""
    return Preset(
        data="imagenet1k", feed=Feed(image=ImagePlan(size=128, mean=HALF, std=HALF), train_image=ViewPlan(size=128, scale=(0.5, 1.0), flip=0.5)),
        config=VQVAE.Config(codec=codec(512, 64, 256, 256, 2, decay=None, idle=0.0),
                            prior=PixelCNN.Config(codes=512, width=128, depth=20, side=32, kernel=5)),
        stages=(Stage(name="codec", objective=VQVAE.losses, trainable=("codec.*",), steps=250_000, batch_size=128,
                      optim=Optim(name="adam", lr=2e-4, schedule="constant")),
                Stage(name="prior", objective=VQVAE.fit_prior, trainable=("prior.*",), steps=250_000, batch_size=128,
                      optim=Optim(name="adam", lr=2e-4, schedule="constant"))))
