"""GAN-CLS and GAN-INT: a picture for a sentence in one pass, learned against a judge who also asks whether the two agree.

    s_r = D(x, phi(t)),   s_w = D(x, phi(t')),   s_f = D(G(z, phi(t)), phi(t))          t' says something else than t does
    D maximises log s_r + (log(1 - s_w) + log(1 - s_f)) / 2,    G maximises log s_f                              (algorithm 1)

Without s_w the judge may pass any picture that looks real; with it, one that does not show what was asked for is as bad as a drawn one. G also
gets phi between two sentences, (phi(t1) + phi(t2)) / 2, for which there is no picture: D alone teaches what belongs there (equation 5). Two
optimisers take turns (`archetypes.generator.alternate`). phi is a text tower trained beforehand with pictures (here CLIP's), and frozen.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.archetypes.generator import Generator, alternate
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, Start, TextPlan, ViewPlan, final
from polysense.decoders.dcgan import TextDiscriminator, TextGenerator
from polysense.objectives.adversarial import mismatched, should_be_fake, should_be_real, should_fool
from polysense.towers.clip import body, tiny_pair
from polysense.towers.clip_text import ClipText

card = Card(
    name="Text-conditional GAN", paper="Reed et al., Generative Adversarial Text to Image Synthesis, ICML 2016",
    arxiv="1605.05396", year=2016, says="Draws a picture for a sentence in a single pass, learned against a judge of pictures and sentences.",
    needs=("image", "text"), can=("generate_image",), official="reedscot/icml2016",
)

PARAMETERS = 81_147_204                      # G 14.8M, D 3.2M, and the frozen text tower 63.2M; the paper gives no total

HALF = (0.5, 0.5, 0.5)


@final
class TextGAN(Generator):
    @dataclass(frozen=True, kw_only=True)
    class Config(Generator.Config):
        generator: TextGenerator.Config
        discriminator: TextDiscriminator.Config
        text: Spec                           # the frozen tower; its pooled feature is phi
        form: str = "log"                    # or "hinge"

    def __init__(self, c: Config):
        super().__init__(c)
        if c.form not in ("log", "hinge"):
            raise UserError(f"no form={c.form!r} of an adversarial loss", "it is 'log' or 'hinge'")
        self.text, self.form = c.text.build(), c.form

    def phi(self, text: Tensor) -> Tensor:
        """text [B,L] -> its feature [B,D], unit norm times sqrt(D), without a gradient."""
        with torch.no_grad():
            feature = self.text.pooled(text).float()
            return torch.nn.functional.normalize(feature, dim=-1) * feature.shape[-1] ** 0.5

    def noise(self, count: int) -> Tensor:
        return torch.randn(count, self.generator.noise, device=self.device)

    def judge(self, batch: Batch) -> Losses:
        image, phi = batch["image"], self.phi(batch["text"])
        with torch.no_grad():
            drawn = self.generator(self.noise(len(image)), phi)
        rows, found = mismatched(batch["text"])
        wrong = self.discriminator(image, phi[rows])
        wrong = wrong[found] if bool(found.any()) else wrong
        return Losses(real=should_be_real(self.discriminator(image, phi), self.form), wrong=0.5 * should_be_fake(wrong, self.form),
                      fake=0.5 * should_be_fake(self.discriminator(drawn, phi), self.form))

    def deceive(self, batch: Batch) -> Losses:
        phi = self.phi(batch["text"])
        between = (phi + phi.roll(1, 0)) / 2
        fooled, interpolated = (should_fool(self.discriminator(self.generator(self.noise(len(p)), p), p), self.form) for p in (phi, between))
        return Losses(fool=fooled, interpolate=interpolated)

    @torch.no_grad()
    def generate_image(self, text: Tensor, *, steps: int, **control: Tensor) -> Tensor:
        """text [B,L] -> [B,3,S,S] in [-1,1]. steps: not used, one pass draws it. UserError for any control but `noise` [B,Z]."""
        if unknown := set(control) - {"noise"}:
            raise UserError(f"this GAN does not know {', '.join(sorted(unknown))}", "it is steered by the text, and by noise [B,Z]")
        noise = control.get("noise", self.noise(len(text)))
        if noise.shape != (len(text), self.generator.noise):
            raise UserError(f"noise of shape {list(noise.shape)}", f"for these texts it is [{len(text)},{self.generator.noise}]")
        return self.generator(noise, self.phi(text))


def config(tower: Spec, width: int, size: int, artist: int, judge: int) -> TextGAN.Config:
    return TextGAN.Config(text=tower, generator=TextGenerator.Config(text=width, size=size, width=artist),
                          discriminator=TextDiscriminator.Config(text=width, size=size, width=judge))


def preset(size: int, of: TextGAN.Config, words: TextPlan, start: Start, data: str, steps: int, batch_size: int, lr: float) -> Preset:
    return Preset(
        data=data, config=of, starts=(start,),
        feed=Feed(image=ImagePlan(size=size, mean=HALF, std=HALF), train_image=ViewPlan(size=size, flip=0.5), text=words),
        stages=(Stage(objective=TextGAN.losses, run=alternate, trainable=("generator.*", "discriminator.*"), steps=steps, batch_size=batch_size,
                      optim=Optim(name="adam", lr=lr, betas=(0.5, 0.999), schedule="constant")),))


def tiny() -> Preset:
    """32 px scenes of one thing; the text tower of the tiny CLIP."""
    text = tiny_pair()["text"]
    return preset(32, config(text, text.width, 32, 32, 32), TextPlan(vocab=4096, length=48),
                  Start(into="text", from_="clip", take="text"), "scenes:single", 1500, 64, 5e-4)


def paper() -> Preset:
    """64 px birds and flowers, 600 epochs of batch 64, Adam 2e-4 with beta1 0.5 (section 5); CLIP's text tower in place of a char-CNN-RNN."""
    text = ClipText.Config(vocab=49408, length=77, body=body(512, 12, 8))
    return preset(64, config(text, 512, 64, 128, 64), TextPlan(vocab=49408, length=77, pad="zero"),
                  Start(into="text", from_="clip", take="text", preset="vit_b_32"), "cub200", 600 * 8_855 // 64, 64, 2e-4)
