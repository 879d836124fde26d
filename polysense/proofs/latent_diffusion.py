"""A latent diffusion model draws what the words say, also pairs of colour and shape that no caption ever joined.

The control is trained on the captions of other pictures; a second baseline is the same kind of U-Net on pixels, given as much time to train. A
small classifier of real pictures (all pairs) reads what was drawn. The text tower is small and frozen as it was born, in the place of CLIP's: its
states tell words apart, which is all that these captions need. Pictures are encoded once. Only scenes whose thing is large: of small ones the
auto-encoder keeps neither colour nor shape in the minute there is. Sized on another seed: words begin to count after some five hundred steps.
"""
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.archetypes.denoiser import Denoiser, Sampler
from polysense.archetypes.stable_diffusion import unet
from polysense.base.system import Batch, Feed, Losses, Preset, Stage, TextPlan, final
from polysense.data import source
from polysense.data.sources import Source
from polysense.decoders.kl_vae import KLVAE
from polysense.nn.norm import GroupNorm
from polysense.nn.unet import UNet
from polysense.objectives.diffusion import guided
from polysense.pipeline import Pipeline
from polysense.proofs.arms import train_arm, words
from polysense.proofs.codecs import codec_psnr
from polysense.proofs.harness import Outcome
from polysense.proofs.latents import all_of, compressed, lend, standing
from polysense.proofs.pool import batches, drawn_once, large
from polysense.systems.generate import latent_diffusion
from polysense.tasks.generation import Judge, fid, seen_by, teach
from polysense.towers.clip import body
from polysense.towers.clip_text import ClipText

METRIC, HIGHER_IS_BETTER = "share of drawn pictures of held-out pairs that show the colour and the shape asked for", True
DATA = "scenes:combos at 32 px, 4 shapes, 4 colours, plain, large (about 3,000 captioned pictures; asked for the held-out pairs)"
SPEC = "scenes:combos?style=plain&size=32&shapes=4&colours=4"
COMPRESS, DENOISE, JUDGE, COUNT = 900, 1100, 600, 100


def plan(compress: int, denoise: int) -> Preset:
    base = latent_diffusion.tiny()
    text = ClipText.Config(vocab=512, length=16, body=body(64, 2, 2), end=2)
    config = base.config.but(vae=KLVAE.Config(widths=(16, 32, 32), depth=1, norm=GroupNorm.Config(groups=8, eps=1e-6)),
                             unet=unet((32, 64), (1,), 64, depth=1, heads=4, groups=16), text=text)
    return base.but(config=config, starts=()).but(**{
        "feed.text": TextPlan(vocab=512, length=16), "stages.0.steps": compress, "stages.0.batch_size": 16, "stages.0.optim.lr": 4e-3,
        "stages.1.steps": denoise, "stages.1.batch_size": 48,
        "stages.1.trainable": ("unet.*", "text.*"), "stages.1.ema": 0.98, "stages.1.optim.lr": 2e-3})


@final
class PixelDiffusion(Denoiser):
    """The baseline: the same text-conditional U-Net, a level deeper, on pixels."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Denoiser.Config):
        unet: UNet.Config
        text: ClipText.Config

    def __init__(self, c: Config):
        super().__init__(c)
        self.unet, self.text = c.unet.build(), c.text.build()

    def context(self, text: Tensor) -> Tensor:
        end = text.new_full((len(text), self.text.length - text.shape[1]), 2)
        return self.text(torch.cat([text, end], 1)).tokens

    def losses(self, batch: Batch) -> Losses:
        gone = torch.rand(len(batch["text"]), 1) < 0.1
        context = self.context(torch.where(gone, torch.full_like(batch["text"], 2), batch["text"]))
        return Losses(noise=self.missed(batch["image"], lambda x, t: self.unet(x, t, context)))

    @torch.no_grad()
    def generate_image(self, text: Tensor, *, steps: int, **control: Tensor) -> Tensor:
        context = torch.cat([self.context(torch.full_like(text, 2)), self.context(text)])
        return self.drawn(torch.randn(len(text), 3, 32, 32), lambda x, t: guided(
            *self.unet(torch.cat([x, x]), torch.cat([t, t]), context).chunk(2), 4.0), steps)


def asked_for(seed: int) -> tuple[list[str], list[str]]:
    """(captions, classes) of pictures with held-out pairs."""
    held = source(f"{SPEC}&n={COUNT}&seed={seed}&captions=1", split="test")
    labels = held.labels()
    return [f"a {held.classes[c]}" for c in labels], [held.classes[c] for c in labels]


def draw(subject: Pipeline, texts: list[str], seed: int) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return torch.cat([subject.system.generate_image(subject.read_texts(texts[i:i + 50]), steps=15) for i in range(0, len(texts), 50)])


def read(judge: Judge, drawn: Tensor, asked: list[str], classes: tuple[str, ...]) -> tuple[float, float, float]:
    """Shares with the right colour and shape, the right colour, the right shape."""
    said = [classes[i].split(" ", 1) for i in seen_by(judge, drawn)[1].argmax(1)]
    pairs = [(s[0] == a.split(" ", 1)[0], s[1] == a.split(" ", 1)[1]) for s, a in zip(said, asked, strict=True)]
    return tuple(sum(f(p) for p in pairs) / len(pairs) for f in (all, lambda p: p[0], lambda p: p[1]))  # type: ignore[return-value]


def learned_judge(source: Source, feed: Feed) -> Judge:
    """A classifier of a source's pictures, taught from memory."""
    return teach(source, feed.image, steps=JUDGE, fed=batches(drawn_once(source, feed, None, ("image", "label")), 128, 0))  # type: ignore[arg-type]


def compare(seed: int, test_seed: int, compress: int = COMPRESS, denoise: int = DENOISE) -> Outcome:
    train, preset = large(source(f"{SPEC}&n=9000&seed={seed}")), plan(compress, denoise).but(**{
        "stages.1.batch_size": 32, "stages.1.optim.lr": 1e-3, "stages.1.trainable": ("unet.*",)})
    everything = large(source(f"{SPEC}&n=9000&seed={seed + 50}&combos=all"))
    judge = learned_judge(everything, preset.feed)
    tokenizer = words(preset, train)
    whole = all_of(train, preset, tokenizer)
    first, kept = compressed(preset, whole, train, seed, tokenizer)
    later = standing(preset.but(stages=preset.stages[1:]))

    def arm(fed: dict[str, Tensor]) -> Pipeline:
        return train_arm("latent_diffusion", later, train, needs=(), seed=seed, tokenizer=tokenizer, prepare=lend(first.system),
                         batches=batches(fed, later.stages[0].batch_size, seed)).subject

    begun = time.perf_counter()
    honest = arm(kept)
    spent = time.perf_counter() - begun
    shuffled, begun = arm({**kept, "text": kept["text"].roll(len(train) // 2, 0)}), time.perf_counter()
    pixels = later.but(config=PixelDiffusion.Config(
        unet=unet((16, 32, 64), (2,), 64, channels=3, depth=1, heads=4, groups=8), text=preset.config.text, schedule="linear",
        sampler=Sampler(name="ddim")), stages=(Stage(
            objective=PixelDiffusion.losses, trainable=("unet.*",), steps=100_000, batch_size=32, ema=0.98, optim=later.stages[0].optim),))
    raw = train_arm("latent_diffusion", pixels, train, needs=(), seed=seed, tokenizer=tokenizer, batches=batches(whole, 32, seed),
                    clock=lambda: (time.perf_counter() - begun) / spent).subject
    texts, asked = asked_for(test_seed)
    drawn = {name: draw(s, texts, seed) for name, s in (("own", honest), ("shuffled", shuffled), ("pixels", raw))}
    scores = {k: read(judge, x, asked, everything.classes) for k, x in drawn.items()}
    held = large(source(f"{SPEC}&n=900&seed={test_seed + 1}", split="test"))
    real = first.read_images([held[i]["image"] for i in range(len(held))])
    far = {k: fid(seen_by(judge, x)[0], seen_by(judge, real)[0]) for k, x in drawn.items()}
    return Outcome(scores["own"][0], {"captions of other pictures": scores["shuffled"][0], "on pixels, in equal time": scores["pixels"][0]}, {
        "colour, shape alone": scores["own"][1:], "FID": far["own"], "FID on pixels": far["pixels"],
        "FID, captions of other pictures": far["shuffled"],
        "judge on real held-out pictures": read(judge, real, [held.classes[c] for c in held.labels()], everything.classes)[0],
        "PSNR of the auto-encoder (dB)": codec_psnr(first, held),
        "deviation of scaled latents": float(first.system.latents(real).std())})


def run(seed: int) -> Outcome:
    return compare(seed, 1001)
