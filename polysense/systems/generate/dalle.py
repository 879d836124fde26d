"""DALL-E: a text and a picture are one sequence of tokens, and a transformer writes the second half.

The picture is the grid of codes of a frozen discrete VAE (the system `dalle_dvae`, stage 1). Stage 2 models

    p(text, image) = prod_i p(t_i | t_<i) prod_j p(z_j | t, z_<j)

with one decoder-only transformer and minimises CE_text / 8 + 7 CE_image / 8, each a mean over its own tokens (section 2.2). Text is causal,
every image token sees all of the text, and of the image what the layer's pattern leaves: the `side` tokens before it (row), its column (every
fourth layer), in the last layer a causal 11x11 window. Padding behind a short text is not masked: every position has a padding token of its
own. In training one in ten merges of the captions' byte-pair encoding is left out. To draw, N candidates are sampled at temperature 1,
decoded, and the one is kept that CLIP finds most like the text (section 2.6).
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.archetypes.token_generator import TokenGenerator
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.plan import DropoutPlan
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, SidesPlan, Spec, Stage, Start, TextPlan, ViewPlan, final
from polysense.decoders.dvae import DVAECodec, DVAEDecoder, DVAEEncoder
from polysense.decoders.vq_codec import small_codec
from polysense.mechanisms.scorer import Scorer
from polysense.nn.block import PreNorm
from polysense.nn.init import ClipInit
from polysense.nn.sparse import patterns
from polysense.nn.transformer import Transformer
from polysense.objectives.codes import masked_ce
from polysense.towers.clip import tiny_pair

card = Card(
    name="DALL-E", paper="Ramesh et al., Zero-Shot Text-to-Image Generation, ICML 2021",
    arxiv="2102.12092", year=2021, says="Draws what a sentence says by writing image tokens behind it, and keeps what a scorer likes best.",
    needs=("image", "text"), can=("generate_image",), official="openai/DALL-E",
)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

DROPOUT = 0.1                                # of merges of the captions' encoding, in training (section 2.2)
PARAMETERS = 12_391_465_094                  # the paper says 12 billion; the tokenizer's 97.6M are counted here


@final
class DALLE(TokenGenerator):
    @dataclass(frozen=True, kw_only=True)
    class Config(TokenGenerator.Config):
        scorer: Spec | None = None           # a Scorer that reads the same tokens; None: candidates are not ranked
        candidates: int = 1                  # of which the best is kept
        image_share: float = 7 / 8           # of the loss
        mean: tuple[float, ...] = (0.0, 0.0, 0.0)       # how the codec's pictures are normalised
        std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __init__(self, c: Config):
        super().__init__(c)
        if c.candidates < 1 or (c.candidates > 1 and c.scorer is None):
            raise UserError(f"candidates={c.candidates} without a scorer", "give a scorer, or one candidate")
        self.scorer = c.scorer.build() if c.scorer is not None else None
        self.candidates, self.image_share, self.mean, self.std = c.candidates, c.image_share, c.mean, c.std

    def losses(self, batch: Batch) -> Losses:
        padded, codes = self.padded(batch["text"]), self.look(batch["image"])
        words, picture = self.logits(padded, codes)
        return Losses(text=(1 - self.image_share) * masked_ce(words, padded[:, 1:]), image=self.image_share * masked_ce(picture, codes))

    @torch.no_grad()
    def nll(self, image: Tensor, text: Tensor) -> Tensor:
        """-log p(codes | text) of each pair, nats an image token: image [B,3,H,W], text [B,l] -> [B]."""
        codes = self.look(image)
        said = self.logits(self.padded(text), codes)[1].float().log_softmax(-1)
        return -said.gather(-1, codes[..., None])[..., 0].mean(1)

    @torch.no_grad()
    def rank(self, image: Tensor, text: Tensor) -> Tensor:
        """How well each picture, normalised as the feed says, fits its text, by the scorer: [B,3,H,W], [B,l] -> [B]."""
        if self.scorer is None:
            raise UserError("this DALL-E has no scorer", "train the preset ranked, or give config.scorer")
        mean, std = (image.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return self.scorer((image * std + mean).clamp(0, 1), text)

    @torch.no_grad()
    def generate_image(self, text: Tensor, *, steps: int, **control: Tensor) -> Tensor:
        """text [B,l] -> [B,3,H,W], the best of `candidates` for each. steps: not used, there is one token after the other. UserError for any
        control but `candidates` [], another number of them."""
        if unknown := set(control) - {"candidates"}:
            raise UserError(f"DALL-E does not know {', '.join(sorted(unknown))}", "it is steered by the text alone")
        count = int(control["candidates"]) if "candidates" in control else self.candidates
        asked = text.repeat_interleave(count, 0)
        drawn: Tensor = self.codec.decode(self.draw(asked))
        if count == 1:
            return drawn
        best = self.rank(drawn, asked).view(len(text), count).argmax(1)
        return drawn[torch.arange(len(text), device=best.device) * count + best]


def body(width: int, depth: int, heads: int, text: int, side: int, kernel: int = 11) -> Transformer.Config:
    blocks = tuple(PreNorm.Config(attn=attn) for attn in patterns(depth, text, side, kernel))
    return Transformer.Config(width=width, depth=depth, heads=heads, block=blocks, init=ClipInit.Config())


def dvae(codes: int, width: int, groups: int, depth: int, into: int, spread: float = 1.0) -> DVAECodec.Config:
    return DVAECodec.Config(encoder=DVAEEncoder.Config(codes=codes, width=width, groups=groups, depth=depth, spread=spread),
                            decoder=DVAEDecoder.Config(codes=codes, width=width, groups=groups, depth=depth, into=into))


LEARNS = ("body.*", "words.*", "codes.*", "place.*", "row.*", "column.*", "text_head.*", "image_head.*")


def preset(size: int, config: DALLE.Config, words: TextPlan, starts: tuple[Start, ...], data: str, stage: Stage) -> Preset:
    return Preset(data=data, config=config, stages=(stage,), starts=starts, feed=Feed(
        text=words, image=ImagePlan(size=size, mean=config.mean, std=config.std), train_image=ViewPlan(size=size)))


def tiny() -> Preset:
    """32 px scenes: up to 24 text tokens, then 8x8 codes of 128."""
    config = DALLE.Config(codec=dvae(128, 32, 3, 1, 64, spread=10.0), body=body(128, 4, 4, 24, 8, kernel=5), text_vocab=512, text_length=24, side=8)
    stage_1 = Start(into="codec", from_="dalle_dvae", take="codec", preset="small")
    return preset(32, config, DropoutPlan(vocab=512, length=24, dropout=DROPOUT), (stage_1,), "scenes:single", Stage(
        objective=DALLE.losses, trainable=LEARNS, steps=800, batch_size=64,
        optim=Optim(lr=2e-3, betas=(0.9, 0.96), weight_decay=0.045, warmup=60, clip=1.0, final=0.05)))


def tiny_vq() -> Preset:
    """tiny on the codes of a VQ-VAE, which in a few hundred steps keeps more of a picture than a relaxed code does."""
    half = (0.5, 0.5, 0.5)
    return tiny().but(starts=(Start(into="codec", from_="vq_vae", take="codec", preset="small"),), **{
        "config.codec": small_codec(), "config.mean": half, "config.std": half, "feed.image.mean": half, "feed.image.std": half})


def ranked() -> Preset:
    """tiny, of whose eight candidates the tiny CLIP, which shares the tokenizer, picks the best."""
    words, base = DropoutPlan(vocab=4096, length=48, dropout=DROPOUT), tiny()
    pair = {k: v for k, v in tiny_pair().items() if k in ("vision", "text", "image_head", "text_head")}
    scorer = Scorer.Config(**pair, size=64, mean=CLIP_MEAN, std=CLIP_STD)
    return base.but(starts=(*base.starts, Start(into="scorer", from_="clip")), **{
        "feed.text": words, "config.scorer": scorer, "config.candidates": 8, "config.text_vocab": words.vocab, "config.text_length": words.length,
        "config.body": body(128, 4, 4, words.length, 8, kernel=5)})


def paper() -> Preset:
    """12 billion parameters on 250M pairs: 64 layers, 62 heads of 64 (section 2.4, appendix B); a caption of 256 tokens, 32x32 codes of 8192.

    Candidates are ranked outside: the paper's CLIP reads other tokens. There the learning rate was halved five times by hand; a cosine falls as far.
    """
    config = DALLE.Config(codec=dvae(8192, 256, 4, 2, 128), body=body(3968, 64, 62, 256, 32), text_vocab=16_384, text_length=256, side=32)
    stage_1 = Start(into="codec", from_="dalle_dvae", take="codec", preset="paper")
    return preset(256, config, DropoutPlan(vocab=16_384, length=256, dropout=DROPOUT), (stage_1,), "laion",
                  Stage(objective=DALLE.losses, trainable=LEARNS, steps=430_000, batch_size=1024, optim=Optim(
                      lr=4.5e-4, betas=(0.9, 0.96), weight_decay=4.5e-2, clip=4.0, warmup=5000, final=1 / 32))).but(**{
                          "feed.train_image": SidesPlan(size=256, sides=(256, 288))})
