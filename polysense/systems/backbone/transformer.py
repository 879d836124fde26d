"""The Transformer: attention in place of recurrence, from one text to another.

    Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V               in h heads of width d / h              (equation 1)
    x = norm(x + dropout(sublayer(x))),      FFN(x) = W2 max(0, W1 x + b1) + b2                            (equation 2)
    PE(p, 2i) = sin(p / 10000^(2i/d)),       PE(p, 2i+1) = cos(p / 10000^(2i/d))                           (section 3.5)

Encoder blocks see the whole source, decoder blocks what has been written and, in between, the encoder's states. One matrix embeds both texts, times
sqrt(d), and predicts words (section 3.4). The target is shifted right behind its start token; the loss is smoothed by 0.1. The rate climbs for 4000
steps and falls with the root of the step, d^-0.5 min(n^-0.5, n 4000^-1.5) (equation 3). Texts are written by a beam of four whose lengths are
penalised by 0.6. Pairs of texts come as `question` and `answer`.
"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.card import Card
from polysense.base.system import Batch, Feed, Losses, Optim, Preset, PromptPlan, Spec, Stage, System, final
from polysense.objectives.language import labels_of, next_token
from polysense.towers.decoding import SmoothBeam
from polysense.towers.translator import Translator, WordBias, halves
from polysense.weights import marian_hf

card = Card(
    name="Transformer", paper="Vaswani et al., Attention Is All You Need, NeurIPS 2017", arxiv="1706.03762", year=2017,
    says="Turns one text into another, as in translation, with an encoder and a decoder made of attention.",
    needs=("question", "answer"), can=("encode_text", "translate_text"), official="tensorflow/tensor2tensor",
)

PARAMETERS = 63_082_496                      # base with 37,000 words; the paper says 65 million

weights = {"marian": marian_hf.LAYOUT}


@final
class Seq2SeqTransformer(System):
    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        language: Translator.Config
        end: int = 2                         # id behind which nothing more is written
        smoothing: float = 0.1
        how: SmoothBeam.Config = field(default_factory=SmoothBeam.Config)

    def __init__(self, c: Config):
        super().__init__()
        self.language, self.end, self.smoothing, self.how = c.language.build(), c.end, c.smoothing, c.how

    def losses(self, batch: Batch) -> Losses:
        """Every word of `answer`, given those before it and `question`."""
        seen, text = self.language(batch["question"]), self.begun(batch["answer"])
        hidden = self.language.decode(text, seen.tokens, seen.mask)
        return Losses(language=next_token(self.language.logits(hidden), labels_of(text, text != self.language.pad), self.smoothing))

    def begun(self, text: Tensor) -> Tensor:
        """text [B,L] with what the decoder begins with before it, where the tokenizer writes no start (Marian's)."""
        start = self.language.begin
        return text if bool((text[:, 0] == start).all()) else torch.cat([text.new_full((len(text), 1), start), text], 1)

    def encode_text(self, text: Tensor) -> Tensor:
        """text [B,L] ids -> [B,D], unit norm: the mean of the encoder's states."""
        return F.normalize(self.language(text).pooled.float(), dim=-1)

    def translate_text(self, text: Tensor, *, max_new: int, how: Spec | None = None) -> Tensor:
        """text [B,L] ids -> ids [B,N] of the other text, N <= max_new, up to and with the end. how: another strategy of `towers.decoding`."""
        return self.language.generate(text, max_new=max_new, end=self.end, how=how or self.how)


def noam(width: int, warmup: int, scale: float = 1.0) -> Optim:
    """Equation 3, times `scale`, with Adam of section 5.3."""
    return Optim(name="adam", lr=scale * (width * warmup) ** -0.5, betas=(0.9, 0.98), eps=1e-9, schedule="rsqrt", warmup=warmup)


def net(vocab: int, length: int, width: int, depth: int, heads: int, hidden: int, dropout: float) -> Seq2SeqTransformer.Config:
    encoder, decoder = halves(width, depth, heads, hidden, dropout)
    return Seq2SeqTransformer.Config(language=Translator.Config(vocab=vocab, length=length, encoder=encoder, decoder=decoder, dropout=dropout))


def tiny() -> Preset:
    """Two layers of width 128: descriptions of drawn scenes in a formal language into English and back."""
    return Preset(
        data="scenes:programs", config=net(512, 64, 128, 2, 4, 512, 0.0), feed=Feed(text=PromptPlan(vocab=512, length=64)),
        stages=(Stage(objective=Seq2SeqTransformer.losses, steps=600, batch_size=64, optim=noam(128, 60, scale=0.3)),))


def alone() -> Preset:
    """`tiny` without cross-attention: a decoder that does not know what it should translate."""
    plan = tiny().config.language.decoder  # type: ignore[attr-defined]
    return tiny().but(**{"config.language.decoder": plan.but(**{"block.cross": None})})


def _wmt(config: Seq2SeqTransformer.Config, width: int, steps: int) -> Preset:
    """25,000 source and as many target tokens a batch, about 800 pairs of sentences (section 5.1)."""
    return Preset(
        data="wmt14_en_de", config=config, feed=Feed(text=PromptPlan(vocab=37_000, length=256)),
        stages=(Stage(objective=Seq2SeqTransformer.losses, steps=steps, batch_size=800, optim=noam(width, 4000)),))


def paper() -> Preset:
    """Base, English to German (table 3)."""
    return _wmt(net(37_000, 256, 512, 6, 8, 2048, 0.1), 512, 100_000)


def big() -> Preset:
    return _wmt(net(37_000, 256, 1024, 6, 16, 4096, 0.3), 1024, 300_000)


def marian() -> Preset:
    """The form of Marian's models (OPUS-MT): sinusoids in two halves, SiLU, a number for each word, the decoder begins with padding."""
    plan = net(58_101, 512, 512, 6, 8, 2048, 0.1)
    encoder, decoder = halves(512, 6, 8, 2048, 0.1, "silu")
    language = plan.language.but(order="halves", start=58_100, pad=58_100, correct=WordBias.Config(vocab=58_101), encoder=encoder, decoder=decoder)
    return paper().but(config=plan.but(language=language, end=0), **{"feed.text.kind": "marian", "feed.text.vocab": 58_101, "feed.text.length": 512})
