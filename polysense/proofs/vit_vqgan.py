"""Codes that are short directions stay in use: ViT-VQGAN names photographs by at least twice as many of its codes as the same transformers whose
codes are as wide as they are and of any length, and draws them at least as well.

Both arms learn from squared errors and the two terms of the codes alone, from the same seed, for as many steps. The wide codes are VQ-VAE's (van den
Oord et al. 2017) between the same encoder and decoder. Sized on the last training pictures, which training leaves out.
"""
import torch

from polysense.base.system import Preset
from polysense.data import source
from polysense.data.sources import Source, Subset
from polysense.decoders.pixelcnn import PixelCNN
from polysense.decoders.vq_codec import VectorQuantizer
from polysense.proofs.arms import Arm, drawn, read_all, some_of, train_arm
from polysense.proofs.codecs import psnr
from polysense.proofs.harness import Outcome
from polysense.systems.generate import vit_vqgan, vq_vae

METRIC, HIGHER_IS_BETTER = "codes in use on held-out photographs (of 512)", True
DATA = "tiny_imagenet40 at 64 px (4,500 train, 500 test), patches of 8 px"
WIDTH, DEPTH, NARROW, CODES = 96, 3, 8, 512
STEPS, BATCH, RATE = 300, 16, 2e-3


def plan(id: str) -> Preset:
    base, body = vit_vqgan.tiny(), vit_vqgan.body(WIDTH, DEPTH, 4)
    stage = base.stages[0].but(steps=STEPS, batch_size=BATCH, **{"optim.lr": RATE})
    if id == "vit_vqgan":
        codec = vit_vqgan.codec(64, 8, body, body, CODES, NARROW)
        return base.but(starts=(), feed=vit_vqgan.feed(64, (0.9, 1.0)), stages=(stage,), **{
            "config.codec": codec, "config.prior.codes": CODES, "config.laplace": 0.0, "config.perceptual_weight": 0.0})
    codec = vit_vqgan.codec(64, 8, body, body, CODES, WIDTH).but(quantizer=VectorQuantizer.Config(codes=CODES, width=WIDTH))
    config = vq_vae.VQVAE.Config(codec=codec, prior=PixelCNN.Config(codes=CODES, width=8, depth=1, side=8), variance=4.0)
    return base.but(config=config, starts=(), feed=vit_vqgan.feed(64, (0.9, 1.0)), stages=(stage.but(
        objective=vq_vae.VQVAE.losses, trainable=("codec.encoder.*", "codec.quantizer.*", "codec.decoder.[!l]*")),))


def looked_at(arm: Arm, image: torch.Tensor) -> tuple[int, float]:
    """(codes in use, PSNR in dB) over pictures [N,3,H,W] in [-1,1]."""
    with torch.inference_mode():
        ids = torch.cat([arm.subject.system.encode_codes(x) for x in image.split(100)])
        out = torch.cat([arm.subject.system.decode_codes(x) for x in ids.split(100)])
    return len(ids.unique()), float(psnr(*((v * 0.5 + 0.5).clamp(0, 1) for v in (out, image))).mean())


def compare(seed: int, train: Source, test: Source) -> Outcome:
    feed = plan("vit_vqgan").feed
    (image, label), (held, _) = read_all(feed, train), read_all(feed, test)
    arms = (train_arm(id, plan(id), train, needs=("image",), seed=seed, batches=drawn(image, label, BATCH, seed)) for id in ("vit_vqgan", "vq_vae"))
    (mine, mine_db), (wide, wide_db) = (looked_at(arm, held) for arm in arms)
    return Outcome(mine, {"twice as many as the same with codes as wide as the transformer": 2 * wide}, {
        "codes in use of the other": wide, "PSNR (dB)": mine_db, "PSNR of the other": wide_db, "PSNR at least equal": mine_db >= wide_db})


def run(seed: int, chosen: bool = False) -> Outcome:
    """chosen: as its sizes were, on training pictures alone."""
    train, test = source("tiny_imagenet40"), source("tiny_imagenet40", split="test")
    if chosen:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        return compare(seed, Subset(train, order[:4500]), Subset(train, order[-500:]))
    return compare(seed, some_of(train, 4500, seed), some_of(test, 500, seed))
