"""DALL-E's discrete VAE: codes without a nearest neighbour, drawn from a softmax that is relaxed while it learns.

The encoder gives logits over K codes at every place, q(z | x) = softmax. Training draws from the Gumbel-softmax relaxation

    z = softmax((logits + g) / tau),   g ~ Gumbel,      tau from 1 to 1/16 by a cosine

soft in the forward and in the backward pass (no straight-through), and maximises

    E_z[ln p(x | z)] - beta KL(q(z | x) || uniform)

with a logit-Laplace likelihood on pixels mapped into [0.1, 0.9] (appendix A.3): the decoder says mu and ln b for every value, and the picture
is the unmapped sigmoid of mu. The whole is divided by the number of pixel values (appendix A.2). tau and beta move in `after_step`. In use
the code of a place is the argmax of its logits. DALL-E models these codes, BEiT predicts them.
"""
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import Tensor

from polysense.archetypes.image_codec import ImageCodec
from polysense.base.card import Card
from polysense.base.plan import EarlyEnd
from polysense.base.system import After, Batch, Feed, ImagePlan, Losses, Optim, Preset, SidesPlan, Stage, ViewPlan, final
from polysense.decoders.dvae import DVAECodec, DVAEDecoder, DVAEEncoder
from polysense.objectives.codes import kl_of_use, kl_to_uniform, logit_laplace, map_pixels, relaxed_codes
from polysense.weights import dvae_dalle

card = Card(
    name="DALL-E dVAE", paper="Ramesh et al., Zero-Shot Text-to-Image Generation, ICML 2021 (the discrete VAE of its first stage)",
    arxiv="2102.12092", year=2021, says="Turns a picture into discrete codes and back; the tokenizer of DALL-E and BEiT.",
    needs=("image",), can=("reconstruct", "encode_codes", "decode_codes"), official="openai/DALL-E",
)

PARAMETERS = 97_616_006                      # the released pair: encoder 53,786,240, decoder 43,829,766

weights = {"openai": dvae_dalle.OPENAI, "flava": dvae_dalle.FLAVA}


@final
class DiscreteVAE(ImageCodec):
    @dataclass(frozen=True, kw_only=True)
    class Config(ImageCodec.Config):
        codec: DVAECodec.Config
        temperature: tuple[float, float] = (1.0, 1 / 16)
        cool: float = 0.05                   # the temperature falls over this fraction of the stage
        beta: tuple[float, float] = (0.0, 6.6)
        rise: float = 1 / 600                # beta rises over this one
        even: float = 0.0                    # weight of the uneven use of codes, beside beta (not in the paper)

    temperature: Tensor
    beta: Tensor

    def __init__(self, c: Config):
        super().__init__(c)
        self.c = c
        self.register_buffer("temperature", torch.tensor(c.temperature[0]))
        self.register_buffer("beta", torch.tensor(c.beta[0]))

    def losses(self, batch: Batch) -> Losses:
        image = batch["image"].clamp(0, 1)                                           # resampling overshoots; beyond, the density is not defined
        logits = self.codec.logits(image)
        mu, log_b = self.codec.spread(relaxed_codes(logits, float(self.temperature)))
        losses = Losses(reconstruct=logit_laplace(map_pixels(image), mu, log_b).mean(), kl=self.beta * kl_to_uniform(logits).sum() / image.numel())
        if self.c.even:
            losses["even"] = self.c.even * kl_of_use(logits) * logits[..., 0].numel() / image.numel()
        return losses.keeping(ids=logits.argmax(-1))

    @torch.no_grad()
    def after_step(self, after: After) -> None:
        self.temperature.fill_(eased(*self.c.temperature, after.progress / self.c.cool))
        self.beta.fill_(eased(*self.c.beta, after.progress / self.c.rise))

    def soft(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """image [B,3,H,W] -> its reconstruction [B,3,H,W] out of a relaxed sample at the present temperature, as training sees it."""
        return self.codec.picture(self.codec.spread(relaxed_codes(self.codec.logits(image), float(self.temperature), generator))[0])


def eased(start: float, end: float, fraction: float) -> float:
    """From start to end along half a cosine, as fraction goes from 0 to 1."""
    return end + (start - end) * (1 + cos(pi * min(max(fraction, 0.0), 1.0))) / 2


def codec(codes: int, width: int, groups: int, depth: int, into: int, spread: float = 1.0) -> DVAECodec.Config:
    return DVAECodec.Config(encoder=DVAEEncoder.Config(codes=codes, width=width, groups=groups, depth=depth, spread=spread),
                            decoder=DVAEDecoder.Config(codes=codes, width=width, groups=groups, depth=depth, into=into))


def plan(size: int, view: ViewPlan, data: str, config: DiscreteVAE.Config, stage: Stage) -> Preset:
    zero, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return Preset(data=data, config=config, stages=(stage,), feed=Feed(image=ImagePlan(size=size, mean=zero, std=one), train_image=view))


def tiny() -> Preset:
    """64 px to 16x16 codes of 256; beta is smaller, as few steps do not fill a code that the prior pulls at. While the decoder does not yet know the
    mean picture, the encoder gains most by writing the one code that comes nearest to it everywhere, and short runs do not come back from there:
    hence a start without favourites (`spread`) and a price on uneven use (`even`)."""
    return plan(64, ViewPlan(size=64, flip=0.5), "scenes", DiscreteVAE.Config(
        codec=codec(256, 32, 3, 1, 64, spread=10.0), cool=0.8, beta=(0.01, 0.3), rise=0.2, even=6.6), Stage(
            objective=DiscreteVAE.losses, steps=800, batch_size=16, optim=Optim(lr=4e-3, weight_decay=1e-4, warmup=20, clip=1.0, final=0.05)))


def small() -> Preset:
    """32 px to 8x8 codes of 128: the words of tiny generators."""
    return tiny().but(**{"config.codec": codec(128, 32, 3, 1, 64, spread=10.0), "feed.image.size": 32, "feed.train_image.size": 32})


def paper() -> Preset:
    """256 px to 32x32 codes of 8192, 3M updates of batch 512 (appendix A.2); temperature over 150k updates, beta over 5k, learning rate over 1.2M."""
    return plan(256, SidesPlan(size=256, sides=(288, 384), flip=0.5), "laion", DiscreteVAE.Config(
        codec=codec(8192, 256, 4, 2, 128), cool=150 / 3000, rise=5 / 3000), Stage(
            objective=DiscreteVAE.losses, steps=3_000_000, batch_size=512, ema=0.999,
            optim=EarlyEnd(lr=1e-4, weight_decay=1e-4, final=1.25e-6 / 1e-4, over=1.2 / 3)))


def tokenizer() -> Preset:
    """The encoder alone, as published for masked image modelling (FLAVA); it is loaded, not trained: training needs the decoder."""
    return paper().but(**{"config.codec.decoder": None})
