"""BERT: a text encoder that looks both ways, taught by words that were hidden from it and by sentences that may follow each other.

    x = norm(word + position + segment), 12 blocks norm(x + attention), norm(x + MLP), exact GELU; pooler tanh(W h_CLS)

    L = -mean log p(hidden word)  -  log p(B follows A)             on [CLS] A [SEP] B [SEP], B the next sentence in half of the texts

15 % of the words are to be guessed: 8 of 10 become [MASK], one a random word, one stays, so that the encoder must know every word from its
context. The predictor norm(gelu(W h)) E^T + b shares the embeddings E. `hide` says how often a text meets the same mask: the authors drew ten for
each before training (`StaticWordMask`), RoBERTa a new one every time (`WordMask`). RoBERTa, the presets `roberta`, also leaves out the question
about the next sentence and the segments, packs whole sentences up to the full length, spells words in bytes and counts positions from 2.

`encode_text` reads the mean of the words, the first token or the pooler (`pool`); other systems take the tower, whose blocks can be split
(`text.body.layers`) and may read another source (`cross`).
"""
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import Batch, Feed, Losses, Optim, PackPlan, PairPlan, Preset, Spec, Stage, Start, System, final
from polysense.decoders.words import WordHead
from polysense.mechanisms.word_mask import StaticWordMask, WordMask
from polysense.nn.block import PostNorm
from polysense.nn.head import LinearBias, TanhHead
from polysense.nn.norm import LayerNorm
from polysense.nn.transformer import Transformer
from polysense.objectives.distil import distilled_words
from polysense.towers.bert import Bert
from polysense.towers.encoded import Encoded
from polysense.towers.roberta import Roberta
from polysense.weights import bert_lm

card = Card(
    name="BERT", paper="Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding, NAACL 2019",
    arxiv="1810.04805", year=2019, says="Reads text in both directions and guesses missing words; the text tower of many systems.",
    needs=("text", "segment|text", "follows|text"), can=("encode_text", "guess_words"), official="google-research/bert",
)

PARAMETERS = 110_106_428                     # BERT-base 109,482,240, both heads 624,188

weights = {"hf": bert_lm.LAYOUT, "roberta": bert_lm.ROBERTA}

POOLS = ("mean", "cls", "pooler")


@final
class BERT(System):
    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        text: Bert.Config
        hide: WordMask.Config
        predict: WordHead.Config | None = None           # None: a file of the encoder alone
        follows: LinearBias.Config | None = None         # [D -> 2], class 0 says that B follows A; None: RoBERTa
        pool: str = "mean"                               # what `encode_text` reads, one of POOLS

    def __init__(self, c: Config):
        super().__init__()
        if c.pool not in POOLS or (c.pool == "pooler" and c.text.pooler is None):
            raise UserError(f"this encoder has no feature {c.pool!r}", f"pool is one of {', '.join(POOLS[:2 + (c.text.pooler is not None)])}")
        self.text, self.hide = c.text.build(), c.hide.build()
        self.predict = c.predict.build() if c.predict is not None else None
        self.follows = c.follows.build() if c.follows is not None else None
        self.pool = c.pool

    def losses(self, batch: Batch) -> Losses:
        """Hidden words, and whether the second sentence follows the first."""
        if self.follows is None:
            raise UserError("this encoder has no head for the next sentence", "train with the objective of the preset roberta")
        text, segment = batch["text"], batch["segment"]
        hidden, chosen = self.hide(text)
        seen = self.text(hidden, mask=text != self.text.pad, kind=segment)
        return Losses(words=distilled_words(self.guess(seen, chosen), text[chosen]),
                      follows=F.cross_entropy(self.follows(seen.pooled).float(), 1 - batch["follows"]))

    def masked(self, batch: Batch) -> Losses:
        """Hidden words alone (RoBERTa)."""
        text = batch["text"]
        hidden, chosen = self.hide(text)
        return Losses(words=distilled_words(self.guess(self.text(hidden, mask=text != self.text.pad), chosen), text[chosen]))

    def guess(self, seen: Encoded, chosen: Tensor) -> Tensor:
        """What the tower said, chosen bool [B,L] -> logits [N,V] of the N chosen words, row by row."""
        if self.predict is None:
            raise UserError("this BERT has no predictor of words: the file held the encoder alone", "take one that was published with its head")
        return self.predict(seen.tokens[chosen], self.text.embed.weight).float()

    def guess_words(self, text: Tensor, hidden: Tensor) -> Tensor:
        """text [B,L] ids, hidden bool [B,L]: the words to be guessed, which are not read -> probabilities [N,V], row by row."""
        return self.guess(self.text(text.masked_fill(hidden, self.hide.mask), mask=text != self.text.pad), hidden).softmax(-1)

    def encode_text(self, text: Tensor) -> Tensor:
        """text [B,L] ids -> [B,D], unit norm: the mean of the words, the first token or the pooler, as `pool` says."""
        seen = self.text(text)
        if self.pool == "mean":
            real = seen.mask[..., None]  # type: ignore[index]
            feature = (seen.tokens * real).sum(1) / real.sum(1).clamp(min=1)
        else:
            feature = seen.tokens[:, 0] if self.pool == "cls" else seen.pooled
        return F.normalize(feature.float(), dim=-1)


def body(width: int, depth: int, heads: int, dropout: float = 0.1, eps: float = 1e-12) -> Transformer.Config:
    """Post-norm blocks that drop what each branch says, and attention weights."""
    block = PostNorm.Config(norm=LayerNorm.Config(eps=eps), dropout=dropout)
    return Transformer.Config(width=width, depth=depth, heads=heads, norm=None, block=block.but(**{"attn.dropout": dropout}))


def net(vocab: int, length: int, width: int, depth: int, heads: int, *, mask: int, special: tuple[int, ...], dropout: float = 0.1) -> BERT.Config:
    """BERT with both heads; `mask` and `special` (padding, start, end) are ids."""
    tower = Bert.Config(vocab=vocab, length=length, body=body(width, depth, heads, dropout), norm_pre=LayerNorm.Config(eps=1e-12), dropout=dropout,
                        pooler=TanhHead.Config(into=width, hidden=width))
    return BERT.Config(text=tower, hide=StaticWordMask.Config(vocab=vocab, mask=mask, special=special),
                       predict=WordHead.Config(width=width, vocab=vocab), follows=LinearBias.Config(into=width, out=2, std=0.02))


def roberta_net(vocab: int, length: int, width: int, depth: int, heads: int, *, mask: int, special: tuple[int, ...], pad: int = 1,
                dropout: float = 0.1) -> BERT.Config:
    """RoBERTa with its head for words."""
    norm = LayerNorm.Config(eps=1e-5)
    tower = Roberta.Config(vocab=vocab, length=length, body=body(width, depth, heads, dropout, 1e-5), norm_pre=norm, dropout=dropout, pad=pad)
    return BERT.Config(text=tower, hide=WordMask.Config(vocab=vocab, mask=mask, special=special),
                       predict=WordHead.Config(width=width, vocab=vocab, norm=norm))


def tiny() -> Preset:
    """Four blocks of width 128 on captions, whose sentences are those about one picture."""
    return Preset(
        data="natural_captions", config=net(2048, 48, 128, 4, 4, mask=4, special=(0, 1, 2), dropout=0.0),
        feed=Feed(text=PairPlan(kind="wordpiece", vocab=2048, length=48)),
        stages=(Stage(objective=BERT.losses, steps=400, batch_size=64, optim=Optim(
            name="adamw", lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98), warmup=40, schedule="linear", clip=1.0)),))


def tiny_roberta() -> Preset:
    """RoBERTa at the size of `tiny`. Its [MASK] is an id behind those of the tokenizer."""
    return Preset(
        data="natural_captions", config=roberta_net(2049, 48, 128, 4, 4, mask=2048, special=(0, 1, 2), pad=0, dropout=0.0),
        feed=Feed(text=PackPlan(vocab=2048, length=48, pad="zero")),
        stages=(tiny().stages[0].but(objective=BERT.masked),))


def _pretraining(length: int, steps: int, warmup: int, final: float) -> Preset:
    return Preset(
        data="bookcorpus+wikipedia", config=net(30_522, 512, 768, 12, 12, mask=103, special=(0, 101, 102)),
        feed=Feed(text=PairPlan(kind="wordpiece", vocab=30_522, length=length)),
        stages=(Stage(objective=BERT.losses, steps=steps, batch_size=256, optim=Optim(
            name="adamw", lr=1e-4, weight_decay=0.01, warmup=warmup, schedule="linear", final=final, clip=1.0)),))


def paper_128() -> Preset:
    """BERT-base, the first nine tenths of its steps: texts of 128 tokens, the rate on its way to a tenth (appendix A.2)."""
    return _pretraining(128, 900_000, 10_000, 0.1)


def paper() -> Preset:
    """BERT-base, the last tenth: texts of 512 tokens, from where the rate of the whole million has come down to."""
    last = _pretraining(512, 100_000, 0, 0.0)
    return last.but(starts=(Start(into="", from_="bert", preset="paper_128"),), **{"stages.0.optim.lr": 1e-5})


def large() -> Preset:
    """BERT-large."""
    return paper_128().but(config=net(30_522, 512, 1024, 24, 16, mask=103, special=(0, 101, 102)))


def roberta() -> Preset:
    """RoBERTa-base: 160 GB of text, batches of 8,000 (Liu et al. 2019, table 9)."""
    return Preset(
        data="bookcorpus+wikipedia+cc_news+openwebtext+stories", config=roberta_net(50_265, 512, 768, 12, 12, mask=50_264, special=(0, 1, 2)),
        feed=Feed(text=PackPlan(kind="roberta", vocab=50_265, length=512)),
        stages=(Stage(objective=BERT.masked, steps=500_000, batch_size=8192, optim=Optim(
            name="adamw", lr=6e-4, weight_decay=0.01, betas=(0.9, 0.98), eps=1e-6, warmup=24_000, schedule="linear")),))
