"""VirTex: a picture tower learned from scratch by captioning in both directions.

The last map of a ResNet, projected, is read by two post-norm decoders: one writes the caption from left to right, the other from right to left. They
have transformer layers of their own and share everything else: projection, word and position embeddings, and the output, whose matrix is that of the
word embeddings.

    L = - mean_t log p(w_t | w_<t, image)  -  mean_t log p(w_t | w_>t, image)                     (section 3, figure 3)

The list of words is turned round as a whole, so that the second decoder begins at the end and stops at the start. A mirrored picture swaps "left"
and "right" in its caption (`MirrorPlan`), and steps are taken under LookAhead. What is wanted is the tower (`encode_image`); the first decoder
captions.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.plan import LookAhead, MirrorPlan
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Part, Preset, Spec, Stage, System, ViewPlan, final
from polysense.decoders.caption import CaptionDecoder
from polysense.nn.attention import Attention
from polysense.nn.block import PostNorm
from polysense.nn.head import LinearBias
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm
from polysense.nn.residual import Basic, Stem
from polysense.nn.transformer import Transformer
from polysense.objectives.language import labels_of, next_token
from polysense.towers.bert import Bert
from polysense.towers.decoding import Beam
from polysense.towers.resnet import ResNet
from polysense.weights import virtex_official

card = Card(
    name="VirTex", paper="Desai & Johnson, VirTex: Learning Visual Representations from Textual Annotations, CVPR 2021", arxiv="2006.06666",
    year=2021, says="Learns a picture tower from few, dense captions by writing them in both directions, and captions pictures.",
    needs=("image", "text"), can=("encode_image", "generate_text"), official="kdexd/virtex",
)

PARAMETERS = 69_482_320                      # ResNet-50 without its head, two decoders of one layer, 10,000 words; none is published

weights = {"official": virtex_official.LAYOUT}


class SharedWords(Part):
    """Output over the vocabulary by the matrix of the word embeddings, with a bias of its own: [...,D] -> [...,V]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        out: int                             # words

    def __init__(self, c: Config):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(c.out))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return F.linear(x, embedding, self.bias)


@final
class VirTex(System):
    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vision: ResNet.Config
        project: LinearBias.Config           # [C -> D]
        decoder: CaptionDecoder.Config       # from left to right; its embeddings and output are those of both
        backward: Transformer.Config | None  # the layers from right to left; None: forward captioning alone

    def __init__(self, c: Config):
        super().__init__()
        self.vision, self.project, self.decoder = c.vision.build(), c.project.build(), c.decoder.build()
        self.backward = c.backward.build() if c.backward is not None else None

    def caption(self, batch: Batch) -> Losses:
        text, seen, pad = batch["text"], self.see(batch["image"]), self.decoder.pad
        ways = {"forward": (text, self.decoder.text.body)} | ({} if self.backward is None else {"backward": (turned(text, pad), self.backward)})
        return Losses(**{k: next_token(self.logits(t, seen, body), labels_of(t, t != pad)) for k, (t, body) in ways.items()})

    def see(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,N,D], the places of the last map, projected."""
        return self.project(self.vision(image).tokens)

    def logits(self, text: Tensor, seen: Tensor, layers: nn.Module) -> Tensor:
        """text [B,L] ids in the direction of the layers, seen [B,N,D] -> logits [B,L,V] of the word after each."""
        words = self.decoder.text
        if text.shape[1] > words.length:
            raise UserError(f"a caption of {text.shape[1]} tokens", f"this decoder reads at most {words.length}: let the tokenizer cut it")
        x = words.dropout(words.norm_pre(words.embed(text) + words.position[:, :text.shape[1]]))
        return self.decoder.words(layers(x, seen, mask=text != self.decoder.pad, causal=True), words.embed.weight)

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,C], unit norm: the mean of the last map, before the projection."""
        return F.normalize(self.vision.pooled(image).float(), dim=-1)

    @torch.no_grad()
    def generate_text(self, image: Tensor, prompt: Tensor, *, max_new: int, how: Spec | None = None) -> Tensor:
        """image [B,3,H,W], prompt [B,P] how the caption begins, ids right-padded -> new ids [B,N], up to and with the end token. how: five beams."""
        seen, d, rows = self.see(image), self.decoder, []
        for i, row in enumerate(prompt):
            given = row[(row != d.start) & (row != d.end) & (row != d.pad)]
            if len(given) + 1 >= d.text.length:
                raise UserError(f"a beginning of {len(given)} tokens", f"this decoder writes at most {d.text.length - 1}: give a shorter one")
            rows.append(d.write(seen[i:i + 1], max_new=min(max_new, d.text.length - len(given)), prompt=given[None] if len(given) else None,
                                how=how or Beam.Config(beams=5))[0])
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=d.pad)


def turned(text: Tensor, pad: int = 0) -> Tensor:
    """text [B,L] -> the same with the real tokens of each row, its start and end included, in the other order; padding stays behind."""
    count = (text != pad).sum(1, keepdim=True)
    at = torch.arange(text.shape[1], device=text.device).expand_as(text)
    return text.gather(1, torch.where(at < count, count - 1 - at, at))


def config(vision: ResNet.Config, width: int, depth: int, heads: int, hidden: int, vocab: int, length: int, dropout: float = 0.1) -> VirTex.Config:
    attn, mlp = Attention.Config(dropout=dropout), MLP.Config(hidden=hidden, dropout=dropout)
    layers = Transformer.Config(width=width, depth=depth, heads=heads, norm=None, block=PostNorm.Config(
        attn=attn, cross=attn, mlp=mlp, dropout=dropout))
    words = Bert.Config(vocab=vocab, length=length, norm_pre=LayerNorm.Config(eps=1e-8), kinds=0, dropout=dropout, body=layers)
    return VirTex.Config(vision=vision, project=LinearBias.Config(into=vision.width, out=width, std=0.02), backward=layers,
                         decoder=CaptionDecoder.Config(text=words, words=SharedWords.Config(out=vocab), start=1, end=2))


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tiny() -> Preset:
    """A ResNet of four blocks on photographs with captions; Adam's steps under LookAhead, which on few steps go further than plain ones."""
    tower = ResNet.Config(layers=(1, 1, 1, 1), base=24, stem=Stem.Config(kernel=3, stride=2, pool=0), block=Basic.Config())
    return Preset(
        data="natural_captions", config=config(tower, 128, 1, 2, 512, 4096, 30),
        feed=Feed(image=ImagePlan(size=64, mean=MEAN, std=STD), text=MirrorPlan(vocab=4096, length=30),
                  train_image=ViewPlan(size=64, scale=(0.2, 1.0), flip=0.5, jitter=0.8, jitter_by=(0.4, 0.4, 0.4, 0.0))),
        stages=(Stage(objective=VirTex.caption, steps=400, batch_size=64,
                      optim=LookAhead(lr=1e-3, weight_decay=1e-4, warmup=40, clip=10.0, lr_scale=(("vision.*", 2.0),))),))


def tiny_forward() -> Preset:
    """From left to right alone."""
    return tiny().but(**{"config.backward": None})


def paper() -> Preset:
    """R-50, L=1, H=1024 on COCO Captions: 500k steps of batch 256, rates of 0.2 for the tower and 0.001 for the text (section 4)."""
    return Preset(
        data="coco_captions", config=config(ResNet.Config(), 1024, 1, 16, 4096, 10_000, 30),
        feed=Feed(image=ImagePlan(size=224, mean=MEAN, std=STD), text=MirrorPlan(vocab=10_000, length=30),
                  train_image=ViewPlan(size=224, scale=(0.2, 1.0), flip=0.5, jitter=0.8, jitter_by=(0.4, 0.4, 0.4, 0.4))),
        stages=(Stage(objective=VirTex.caption, steps=500_000, batch_size=256, optim=LookAhead(
            name="sgd", lr=1e-3, weight_decay=1e-4, momentum=0.9, warmup=10_000, clip=10.0, lr_scale=(("vision.*", 200.0),))),))
