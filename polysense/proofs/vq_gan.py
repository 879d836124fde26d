"""VQ-GAN draws photographs less blurred, at a small price in decibels, than the same codec asked for small squares alone; a transformer over its
codes tells the next one better than how often each occurs.

Sharpness is the variance of the Laplacian of what was drawn by that of the photograph, over all of the test part; the score is how far its
logarithm is from that of an exact copy. The twin is VQ-VAE with the very same codec, squared errors in place of all else, for as many steps. The
network of the perceptual distance has random weights, which the seed draws. Pictures are 32 px, coded by f = 4: the budget is that of one processor.
Sized on the last training pictures, which training leaves out: a heavier critic and perceptual term, tried first, cost more decibels than asked; the
lighter ones here were chosen after that. As filed, both draw with a small share of the sharpness of photographs, VQ-GAN with more of it: the critic
has so few steps that its gain is no more than a beginning.
"""
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.system import Preset
from polysense.data import source
from polysense.data.sources import Source, Subset
from polysense.decoders.pixelcnn import PixelCNN
from polysense.proofs.arms import Arm, drawn, read_all, some_of, train_arm
from polysense.proofs.codecs import psnr
from polysense.proofs.harness import Outcome
from polysense.systems.generate import vq_gan, vq_vae

METRIC, HIGHER_IS_BETTER = "| log sharpness of drawn photographs by that of the originals |", False
DATA = "tiny_imagenet40 at 32 px (4,000 train, 400 test); 256 codes on 8x8 places"
BLURRED, SHARPENED, WROTE, BATCH = 220, 80, 120, 8
RATE, LATER = 2e-3, 3e-4
LOOK, CRITIC = 0.03, 0.3                     # weights of the perceptual distance and, beside the balance of gradients, of the critic


def plan() -> Preset:
    base = vq_gan.tiny()
    steps = {f"stages.{i}.steps": n for i, n in enumerate((BLURRED, SHARPENED, WROTE))}
    return base.but(starts=(), **steps, **{"stages.0.batch_size": BATCH, "stages.1.batch_size": BATCH, "stages.0.optim.lr": RATE,
                                           "stages.1.optim.lr": LATER, "config.perceptual_weight": LOOK, "config.critic_weight": CRITIC})


def twin() -> Preset:
    """The same codec with squared errors alone, its optimiser that of the two stages one after the other."""
    mine = plan()
    config = vq_vae.VQVAE.Config(codec=vq_gan.tiny_codec(), prior=PixelCNN.Config(codes=256, width=8, depth=1, side=8), beta_on="codebook")
    stage = vq_vae.tiny().stages[0]
    return mine.but(config=config, stages=tuple(stage.but(steps=s.steps, batch_size=s.batch_size, optim=s.optim) for s in mine.stages[:2]))


def laplacian(image: Tensor) -> Tensor:
    """image [B,3,H,W] in [0,1] -> variance over places of its grey Laplacian, [B]."""
    kernel = image.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    return F.conv2d(image.mean(1, keepdim=True), kernel).flatten(1).var(1)


def looked_at(arm: Arm, image: Tensor) -> tuple[float, float]:
    """(log of the ratio of sharpness, PSNR in dB) of what becomes of pictures [N,3,H,W] in [-1,1]."""
    with torch.inference_mode():
        out = torch.cat([arm.subject.system.reconstruct(x) for x in image.split(100)])
    made, seen = ((v * 0.5 + 0.5).clamp(0, 1) for v in (out, image))
    return log(float(laplacian(made).mean() / laplacian(seen).mean())), float(psnr(made, seen).mean())


def compare(seed: int, train: Source, test: Source) -> Outcome:
    mine = plan()
    (image, label), (held, _) = read_all(mine.feed, train), read_all(mine.feed, test)

    def arm(id: str, preset: Preset) -> Arm:
        return train_arm(id, preset, train, needs=("image",), seed=seed, batches=drawn(image, label, BATCH, seed))

    sharp, blurred = arm("vq_gan", mine), arm("vq_vae", twin())
    (mine_off, mine_db), (other_off, other_db) = looked_at(sharp, held), looked_at(blurred, held)
    system = sharp.subject.system
    with torch.inference_mode():
        seen, ids = (torch.cat([system.encode_codes(x) for x in of.split(200)]) for of in (image, held))
        said = torch.cat([system.prior(x).float().log_softmax(-1) for x in ids.split(100)])
    nll = float(-said.gather(-1, ids[..., None]).mean())
    share = (torch.bincount(seen.flatten(), minlength=system.codec.codes) + 1).float()
    unigram = float(-(share / share.sum()).log()[ids.flatten()].mean())
    return Outcome(abs(mine_off), {"the same codec for squared errors alone": abs(other_off)}, {
        "log sharpness": mine_off, "log sharpness of the twin": other_off, "PSNR (dB)": mine_db, "PSNR of the twin": other_db,
        "less than 2 dB below the twin": mine_db > other_db - 2, "nats a code of the transformer": nll, "of a unigram": unigram,
        "the transformer beats the unigram": nll < unigram, "codes in use": len(ids.unique())})


def run(seed: int, chosen: bool = False) -> Outcome:
    """chosen: as its sizes were, on training pictures alone."""
    train, test = source("tiny_imagenet40"), source("tiny_imagenet40", split="test")
    if chosen:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        return compare(seed, Subset(train, order[:4000]), Subset(train, order[-400:]))
    return compare(seed, some_of(train, 4000, seed), some_of(test, 400, seed))
