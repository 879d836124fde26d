"""Cap and CapPa: a picture tower learned by captioning alone.

A ViT without class token; all its patches are read by a shallow text decoder, and the only loss is the cross-entropy of the caption's tokens. Cap
writes from left to right. In CapPa each sample, with chance 0.75, is asked for all its tokens at once: every input is the same mask token, nobody is
hidden from anybody, and the targets stay where they are,

    sum_t log p(x_t | image, x_<t)      or      sum_t log p(x_t | image)                                   (section 3)

so that nothing but the picture can tell. That mode exists in training only. Afterwards the decoder captions (`generate_text`), labels are ranked by
the likelihood of their text (`score_text`), and the mean of the patches is the feature. The decoder has no biases, its embeddings start as N(0, 1)
and are not shared with the output, which starts at zero.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Part, Preset, PromptPlan, Spec, Stage, System, ViewPlan, final
from polysense.decoders.caption import CaptionDecoder
from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.head import Nothing
from polysense.nn.mlp import MLP
from polysense.nn.transformer import Transformer
from polysense.objectives.language import labels_of, token_log_likelihood
from polysense.towers.bert import Bert
from polysense.towers.shapes import plain_vit
from polysense.towers.vit import ViT

card = Card(
    name="CapPa", paper="Tschannen et al., Image Captioners Are Scalable Vision Learners Too, NeurIPS 2023", arxiv="2306.07915", year=2023,
    says="Learns to see by captioning, from left to right or all words at once, and writes captions.",
    needs=("image", "text"), can=("encode_image", "generate_text"), official="google-research/big_vision (cappa)",
)

PARAMETERS = 191_636_736                     # ViT-B/16 85.8M, decoder of six layers 56.7M, embeddings and output 24.6M each; none is published


class BareNorm(Part, nn.LayerNorm):
    """Layer norm without a bias."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # 0: set by the owner
        eps: float = 1e-6

    def __init__(self, c: Config):
        nn.LayerNorm.__init__(self, c.width, eps=c.eps, bias=False)


class OwnWords(Part):
    """Output over the vocabulary with a matrix of its own, zero at birth: [...,D] -> [...,V]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        out: int
        width: int = 0                       # 0: set by the owner

    def __init__(self, c: Config):
        super().__init__()
        self.out = nn.Linear(c.width, c.out, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """embedding: that of the inputs, which is not shared."""
        return self.out(x)


@final
class CapPa(System):
    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vision: ViT.Config
        decoder: CaptionDecoder.Config       # its embeddings hold one token more than the vocabulary: the mask
        parallel: float = 0.75               # chance that a sample's tokens are all predicted at once; 0: Cap

    def __init__(self, c: Config):
        super().__init__()
        self.vision, self.decoder = c.vision.build(), c.decoder.build()
        nn.init.normal_(self.decoder.text.embed.weight)
        self.parallel, self.mask = c.parallel, c.decoder.text.vocab - 1

    def caption(self, batch: Batch) -> Losses:
        text, seen = batch["text"], self.vision(batch["image"]).tokens
        at_once = torch.rand(len(text), device=text.device) < self.parallel
        target = text[:, 1:]
        logits = self.predict(text, seen, at_once)
        return Losses(caption=F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=self.decoder.pad))

    def predict(self, text: Tensor, seen: Tensor, at_once: Tensor) -> Tensor:
        """text [B,L] with its start, seen [B,N,D], at_once bool [B] -> logits [B,L-1,V] of the tokens after the start."""
        inputs = torch.where(at_once[:, None], self.mask, text[:, :-1])
        n = inputs.shape[1]
        sees = torch.ones(n, n, dtype=torch.bool, device=text.device).tril()[None] | at_once[:, None, None]
        said = self.decoder.text(inputs, mask=sees, source=seen)
        return self.decoder.words(said.tokens, self.decoder.text.embed.weight)

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm: the mean of the patches."""
        return F.normalize(self.vision.pooled(image).float(), dim=-1)

    @torch.no_grad()
    def generate_text(self, image: Tensor, prompt: Tensor, *, max_new: int, how: Spec | None = None) -> Tensor:
        """image [B,3,H,W], prompt [B,P] how the caption begins, ids right-padded -> new ids [B,N], up to and with the end token."""
        seen, d, rows = self.vision(image).tokens, self.decoder, []
        for i, row in enumerate(prompt):
            given = row[(row != d.start) & (row != d.end) & (row != d.pad)]
            rows.append(d.write(seen[i:i + 1], max_new=max_new, prompt=given[None] if len(given) else None, how=how)[0])
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=d.pad)

    def score_text(self, image: Tensor, text: Tensor) -> Tensor:
        """image [B,3,H,W], text [C,L] ids of candidates -> [B,C]: log p(text | image), summed over its tokens, read from left to right."""
        seen, label = self.vision(image).tokens, labels_of(text, text != self.decoder.pad)
        return torch.stack([token_log_likelihood(self.decoder(text, s.expand(len(text), -1, -1)), label) for s in seen])


def config(size: int, patch: int, image: tuple[int, int, int], text: tuple[int, int, int], vocab: int, length: int, parallel: float = 0.75,
           start: int = 1, end: int = 2) -> CapPa.Config:
    """image and text: (width, depth, heads)."""
    bare, attn = BareNorm.Config(), Attention.Config(bias="")
    block = PreNorm.Config(attn=attn, mlp=MLP.Config(bias=""), norm=bare, cross=Attention.Config(bias="", source=image[0]))
    words = Bert.Config(vocab=vocab + 1, length=length, norm_pre=Nothing.Config(), kinds=0, body=Transformer.Config(
        width=text[0], depth=text[1], heads=text[2], norm=bare, block=block))
    return CapPa.Config(vision=plain_vit(size, patch, *image, prefix=0, pool="mean"), parallel=parallel,
                        decoder=CaptionDecoder.Config(text=words, words=OwnWords.Config(out=vocab), start=start, end=end))


def tiny() -> Preset:
    return Preset(
        data="natural_captions", config=config(64, 8, (128, 4, 2), (128, 2, 2), 4096, 48),
        feed=Feed(image=ImagePlan(size=64), text=PromptPlan(vocab=4096, length=48), train_image=ViewPlan(size=64, scale=(0.6, 1.0))),
        stages=(Stage(objective=CapPa.caption, steps=400, batch_size=64, optim=Optim(lr=1e-3, weight_decay=1e-4, warmup=40, clip=1.0)),))


def tiny_cap() -> Preset:
    """From left to right alone."""
    return tiny().but(**{"config.parallel": 0.0})


def paper() -> Preset:
    """ViT-B/16 and six layers over a vocabulary of 32,000, WebLI, batch 8192, 9 billion samples; their decay of 1e-4 is not multiplied
    by the rate of 1e-3."""
    return Preset(
        data="webli", config=config(224, 16, (768, 12, 12), (768, 6, 12), 32_000, 64),
        feed=Feed(image=ImagePlan(size=224, fit="squash", resample="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3),
                  text=PromptPlan(vocab=32_000, length=64)),
        stages=(Stage(objective=CapPa.caption, steps=9_000_000_000 // 8192, batch_size=8192,
                      optim=Optim(name="adafactor", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999), warmup=10_000, clip=1.0)),))


def paper_cap() -> Preset:
    return paper().but(**{"config.parallel": 0.0})
