"""Textual inversion: a new word for one thing, learned from three to five pictures.

A trained text-to-image model is frozen altogether. The vocabulary gets a new word S*, and the only thing that is learned is its embedding, one row
v* (or a few), which begins as the embedding of a coarse word for the thing ("star"):

    v* = argmin_v || e - eps(A_t z + B_t e, t, tau(y(v))) ||^2,    y a neutral sentence: "a photo of a S*"        (equation 2)

The gradient passes through the U-Net's cross-attention and the whole text tower to that row; no other row is part of what is trained, so neither
weight decay nor the optimiser's moments can reach one. The result is a vector of a few kilobytes that any prompt can use: "two S* on a beach".
`data.concept` makes captioned data of pictures, `feed.text.new` names the word, `weights.concept` reads and writes shared words.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polysense.archetypes.denoiser import Sampler
from polysense.archetypes.latent_diffusion import LatentDiffusion
from polysense.archetypes.stable_diffusion import PARAMETERS as BASE
from polysense.archetypes.stable_diffusion import pictures, standing_on, tiny_base, version_1
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.plan import WordsPlan
from polysense.base.system import Batch, Losses, Optim, Preset, Stage, final
from polysense.weights import latent_diffusion as layouts

card = Card(
    name="Textual Inversion",
    paper="Gal et al., An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion, ICLR 2023",
    arxiv="2208.01618", year=2023, says="Learns one new word for a thing or a style from a few pictures.",
    needs=("image", "text"), can=("generate_image", "reconstruct"), official="rinongal/textual_inversion",
)

PARAMETERS = BASE + 768                      # Stable Diffusion 1 and the row

weights = {"diffusers": layouts.DIFFUSERS, "original": layouts.ORIGINAL}


@final
class TextualInversion(LatentDiffusion):
    @dataclass(frozen=True, kw_only=True)
    class Config(LatentDiffusion.Config):
        vectors: int = 1                     # rows of the new word
        like: tuple[int, ...] = ()           # ids of the coarse word that it begins as (their mean); none: the mean of the whole table

    def __init__(self, c: Config):
        super().__init__(c)
        if any(not 0 <= i < c.text.vocab for i in c.like) or c.vectors < 1:
            raise UserError(f"like={c.like}, vectors={c.vectors}", f"ids lie below {c.text.vocab}, and a word has at least one vector")
        self.like = c.like
        self.word = nn.Parameter(torch.zeros(c.vectors, c.text.width))
        self.after_start()

    def after_start(self) -> None:
        """v* begins as the embedding of the coarse word."""
        table = self.text.embed.weight.detach()
        with torch.no_grad():
            assert self.word is not None
            self.word.copy_((table[list(self.like)] if self.like else table).mean(0).expand_as(self.word))

    def losses(self, batch: Batch) -> Losses:
        if not (batch["text"] >= self.text.embed.num_embeddings).any():
            raise UserError("no caption of this batch has the new word", "name it in feed.text.new and in the captions: see data.concept")
        return Losses(noise=self.noise_error(batch["image"], batch["text"]))

    def known(self, vectors: Tensor) -> None:
        """Takes a shared word's vectors [vectors,D] (`weights.concept.read_concept`). UserError for another shape."""
        assert self.word is not None
        if vectors.shape != self.word.shape:
            raise UserError(f"a word of {list(vectors.shape)}", f"this system has room for {list(self.word.shape)}")
        with torch.no_grad():
            self.word.copy_(vectors)


def tiny() -> Preset:
    """On latent_diffusion tiny; the word is <it>. `data` is a stand-in: give your own pictures."""
    words = WordsPlan(vocab=4096, length=48, new=(("<it>", 1),))
    return Preset(
        data="scenes:single?style=plain&size=32&n=5", feed=pictures(32, words), starts=standing_on("tiny"),
        config=TextualInversion.Config(**tiny_base(drop=0.0)), stages=(Stage(
            objective=TextualInversion.losses, trainable=("word",), steps=300, batch_size=16, optim=Optim(lr=0.02, schedule="constant", warmup=10)),))


def paper() -> Preset:
    """On Stable Diffusion 1, as words are shared since: 3,000 steps of batch 4 at 5e-4. The paper's own numbers, 5,000 steps at 0.04, are for its
    latent diffusion model of 1.45B."""
    words = WordsPlan(vocab=49408, length=77, new=(("<it>", 1),))
    return Preset(
        data="concept", feed=pictures(512, words), starts=standing_on("paper"),
        config=TextualInversion.Config(**version_1(drop=0.0, sampler=Sampler(name="ddim", offset=1, last="first"))), stages=(Stage(
            objective=TextualInversion.losses, trainable=("word",), steps=3_000, batch_size=4,
            optim=Optim(lr=5e-4, weight_decay=0.01, schedule="constant")),))
