"""BLIP-2: a small Querying Transformer between a frozen image tower and a frozen language model, trained in two stages.

Stage 1, align (section 3.2): 32 learned queries read the tokens of the last ViT block but one, through a trained norm. Three losses:

    contrast  s(I, T) = max over queries of cos(image_head(query), text_head(text[CLS])) / temperature, "own" mask, label smoothing 0.1
    match     a two-way head on every query, its logits averaged, "all" mask; one hard picture for each text, one hard text for each picture
    caption   the words of the text from left to right, "causal" mask; [DEC] stands in place of [CLS]

with negatives from the batches of all ranks, no queue and no momentum: the tower is frozen, so batches can be large. The queries are computed
once for contrast and caption. Stage 2, speak (section 3.3): the queries, projected to the width of the language model, stand in front of its
word embeddings as soft prompts; its own loss on the text behind them trains the Q-Former and the projection alone. An encoder-decoder
(FlanT5) is also given the first words of the text, as many as a die says, and its loss is that of the rest.

Both neighbours stay as they are, byte for byte. The tiny preset first teaches a language model to read captions without pictures (stage read).
"""
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.archetypes.prompted_lm import PromptedLM
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import (
    After,
    Batch,
    Feed,
    ImagePlan,
    Losses,
    Optim,
    Preset,
    PromptPlan,
    Spec,
    Stage,
    Start,
    TextPlan,
    ViewPlan,
    final,
)
from polysense.connectors.qformer import Looked, QFormer
from polysense.decoders.words import WordHead
from polysense.mechanisms.bag import bag
from polysense.nn.block import PreNorm
from polysense.nn.build import build
from polysense.nn.head import LinearBias
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm
from polysense.nn.transformer import Transformer
from polysense.objectives.language import labels_of, next_token
from polysense.objectives.matching import matching_loss, matching_pairs
from polysense.objectives.spread import gather, places, world
from polysense.towers.causal_lm import opt
from polysense.towers.clip import body, image_tower
from polysense.towers.seq2seq import flan_t5
from polysense.towers.vit import ViT
from polysense.weights import blip2_hf, blip2_lavis

card = Card(
    name="BLIP-2",
    paper="Li et al., BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models, ICML 2023",
    arxiv="2301.12597", year=2023,
    says="Joins a frozen image model and a frozen language model by a small transformer of queries: captions, answers, matching and search.",
    needs=("image", "text"), can=("encode_image", "encode_text", "match_text", "generate_text"), official="salesforce/LAVIS",
)

PARAMETERS = 1_174_000_000                   # the EVA ViT-g up to its last block but one 986M, the Q-Former 188M (section 3.1); paper_opt adds 2.7B

weights = {"hf": blip2_hf.LAYOUT, "lavis": blip2_lavis.LAYOUT}


class Alignment(nn.Module):
    """What stage 1 adds to the Q-Former: heads into the joint space, the matching head, and (where given) the word predictor."""

    def __init__(self, width: int, dim: int, words: Any):
        super().__init__()
        self.image_head, self.text_head, self.match_head = (LinearBias.Config(into=width, out=n, std=0.02).build() for n in (dim, dim, 2))
        self.words = words


@final
class BLIP2(PromptedLM):
    @dataclass(frozen=True, kw_only=True)
    class Config(PromptedLM.Config):
        vision: Spec                         # a ViT, or what has its interface
        layer: int = -2                      # the block whose tokens are read, counted from the end
        norm: Spec                           # of what is read
        qformer: QFormer.Config
        dim: int = 256                       # of the joint space; 0: a model of stage 2 alone, without the heads of stage 1
        words: Spec | None = None            # a WordHead for the caption loss; without it (published matching models) stage 1 is over
        decode: int = 0                      # id of [DEC], an embedding of the Q-Former that no text has
        temperature: float = 0.07
        bounds: tuple[float, float] = (0.001, 0.5)

    def __init__(self, c: Config):
        super().__init__(c, c.qformer.width, c.qformer.pad)
        self.vision, self.qformer, self.norm_vision = c.vision.build(), c.qformer.build(), build(c.norm, width=c.qformer.source)
        blocks = len(self.vision.body.blocks)
        if not -blocks <= c.layer < 0:
            raise UserError(f"layer={c.layer} of a tower of {blocks} blocks", "count from the end: -1, -2, ...")
        self.stop = blocks + 1 + c.layer
        words = build(c.words, width=c.qformer.width, vocab=c.qformer.vocab) if c.words is not None else None
        self.align_heads = Alignment(c.qformer.width, c.dim, words) if c.dim else None
        self.temperature = nn.Parameter(torch.tensor(c.temperature)) if c.words is not None else None
        self.decode, self.bounds = c.decode, c.bounds

    # -- what the parts say -------------------------------------------------------------------------------------------------------------

    def see(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> all tokens after one block of the frozen tower, normed [B,S,W]. Later blocks are not computed."""
        return self.norm_vision(self.vision.body.layers(self.vision.embed(image)[0], stop=self.stop)[-1])

    @property
    def heads(self) -> Any:
        if self.align_heads is None:
            raise UserError("this BLIP-2 has only its second stage", "matching and search need the weights of stage 1")
        return self.align_heads

    def query_features(self, query: Tensor) -> Tensor:
        """[B,Q,D] -> unit features [B,Q,E] in the joint space."""
        return F.normalize(self.heads.image_head(query).float(), dim=-1)

    def text_features(self, text: Tensor) -> Tensor:
        """text [B,L] -> unit features [B,E]."""
        return F.normalize(self.heads.text_head(self.qformer.say(text)[:, 0]).float(), dim=-1)

    def match_logits(self, seen: Tensor, text: Tensor) -> Tensor:
        """Image tokens [B,S,W] and text [B,L] -> (no, yes) [B,2], the mean over queries."""
        return self.heads.match_head(self.qformer.both(seen, text)[0]).mean(1)

    # -- stage 0, 1, 2 ------------------------------------------------------------------------------------------------------------------

    def read(self, batch: Batch) -> Losses:
        """The language model alone: captions, and captions behind a bag of their own words in the place of the soft prompts. What it knows before
        it sees: to write, and to use what stands before."""
        text = batch["text"]
        words = (text != self.pad) & (text != self.end)
        words[:, 0] = False
        told = self.speaker.embed(bag(text, words, self.qformer.queries))
        return Losses(language=self.nll(text, None), told=self.nll(text, told))

    def align(self, batch: Batch) -> Losses:
        if self.temperature is None:
            raise UserError("this BLIP-2 has no word predictor: its first stage is over", "train it from a preset that has one")
        seen, text = self.see(batch["image"]), batch["text"]
        looked = self.qformer.look(seen)
        queries, words, scale = self.query_features(looked.query), self.text_features(text), 1 / self.temperature
        at = places(text)
        to_text = best_query(queries, gather(words, at)).mul(scale)
        to_image = best_query(gather(queries, at), words).mul(scale).T
        own = torch.arange(len(text), device=text.device) + at.start
        contrast = sum(F.cross_entropy(s, own, label_smoothing=0.1) for s in (to_text, to_image)) / 2
        pairs = matching_pairs(to_text, to_image, at.start)
        longest = text if world()[1] == 1 else F.pad(text, (0, self.qformer.length - text.shape[1]), value=self.pad)
        match = self.match_logits(gather(seen, at)[pairs.image], gather(longest, at)[pairs.text])
        return Losses(contrast=torch.as_tensor(contrast), match=matching_loss(match, pairs.truth), caption=self.caption_loss(looked, text))

    def caption_loss(self, looked: Looked, text: Tensor) -> Tensor:
        """The text from left to right behind the queries; label smoothing 0.1, as released."""
        begun = torch.cat([torch.full_like(text[:, :1], self.decode), text[:, 1:]], 1)
        logits = self.heads.words(self.qformer.say(begun, looked), self.qformer.embed.weight)
        return next_token(logits, labels_of(text, text != self.pad), smoothing=0.1)

    def speak(self, batch: Batch) -> Losses:
        return Losses(language=self.nll(batch["text"], self.soft_prompt(batch["image"])))

    def soft_prompt(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,Q,width of the language model]."""
        return self.to_language(self.qformer.look(self.see(image)).query)

    # -- capabilities -------------------------------------------------------------------------------------------------------------------

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,E], unit norm: the mean direction of the queries. One vector is what an index can hold; training compares with
        the best query (`query_features`), and `match_text` gives the exact second look."""
        return F.normalize(self.query_features(self.qformer.look(self.see(image)).query).mean(1), dim=-1)

    def encode_text(self, text: Tensor) -> Tensor:
        """text [B,L] ids -> [B,E], unit norm."""
        return self.text_features(text)

    def match_text(self, image: Tensor, text: Tensor) -> Tensor:
        """image [B,3,H,W] and text [B,L], or one of either for all of the other -> probability [B] that they belong together."""
        if len(image) != len(text) and 1 not in (len(image), len(text)):
            raise UserError(f"{len(image)} pictures and {len(text)} texts cannot be paired", "give equally many, or one of either")
        n, seen = max(len(image), len(text)), self.see(image)
        return self.match_logits(seen.expand(n, -1, -1), text.expand(n, -1)).float().softmax(-1)[:, 1]

    @torch.no_grad()
    def after_step(self, after: After) -> None:
        if self.temperature is not None:
            self.temperature.clamp_(*self.bounds)


def best_query(queries: Tensor, words: Tensor) -> Tensor:
    """Unit features of queries [B,Q,E] and texts [N,E] -> [B,N], the cosine of the nearest query (equation of section 3.2)."""
    with torch.autocast(queries.device.type, enabled=False):
        return (queries.float() @ words.float().T).amax(1)


ALIGN = ("norm_vision.*", "qformer.*", "align_heads.*", "temperature")
SPEAK = ("norm_vision.*", "qformer.query", "qformer.norm_pre.*", "qformer.blocks.*.attn.*", "qformer.blocks.*.norm1.*", "qformer.blocks.*cross*",
         "qformer.blocks.*_query.*", "to_language.*")


def tiny() -> Preset:
    """CLIP's ViT of 64 px, read after its last block but one; a language model of two blocks that reads captions first; then both stages."""
    optim = Optim(lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98), warmup=30, clip=1.0)
    return Preset(
        data="scenes", starts=(Start(into="vision", from_="clip", take="vision", preset="tiny_vit"),),
        config=BLIP2.Config(
            vision=image_tower(64, 8, body(192, 6, 3)),
            norm=LayerNorm.Config(eps=1e-6), qformer=QFormer.Config(queries=8, width=128, depth=4, heads=4, source=192, vocab=2049, length=48),
            dim=64, words=WordHead.Config(vocab=2049), start=1, end=2, decode=2048,
            language=opt(vocab=2048, length=384, width=128, depth=2, heads=4)),
        feed=Feed(image=ImagePlan(size=64), train_image=ViewPlan(size=64, scale=(0.8, 1.0)),
                  text=PromptPlan(kind="wordpiece", vocab=2048, length=48)),
        stages=(Stage(name="read", objective=BLIP2.read, trainable=("language.*",), steps=300, batch_size=64, optim=optim),
                Stage(name="align", objective=BLIP2.align, trainable=ALIGN, steps=400, batch_size=64, optim=optim),
                Stage(name="speak", objective=BLIP2.speak, trainable=SPEAK, steps=300, batch_size=64, optim=optim)))


def tiny_t5() -> Preset:
    """`tiny` with an encoder-decoder of two blocks each for a language model: it is given the first words of a caption and writes the rest."""
    base = tiny()
    return base.but(config=base.config.but(language=flan_t5(vocab=2048, width=128, depth=2, heads=4, head_width=32, hidden=256)))


def eva() -> ViT.Config:
    """EVA-CLIP's ViT-g/14 without its last block (section 3.4), as released."""
    norm = LayerNorm.Config(eps=1e-6)
    return ViT.Config(image_size=224, patch=14, body=Transformer.Config(width=1408, depth=39, heads=16, norm=None, block=PreNorm.Config(
        norm=norm, mlp=MLP.Config(hidden=6144))))


def paper() -> Preset:
    """Stage 1 with ViT-g on a Q-Former that begins as BERT-base: 250,000 steps of batch 1680 on 129M pictures (section 3.4)."""
    return Preset(
        data="coco_captions+vg+cc3m+cc12m+sbu+laion115m", starts=(Start(into="qformer", from_="bert", take="text", preset="paper"),),
        config=BLIP2.Config(vision=eva(), layer=-1, norm=LayerNorm.Config(), start=101, end=102, decode=30522, words=WordHead.Config(vocab=30523),
                            qformer=QFormer.Config(source=1408, vocab=30523, dropout=0.1)),
        feed=Feed(image=ImagePlan(size=224, fit="squash"), train_image=ViewPlan(size=224, scale=(0.5, 1.0), flip=0.5),
                  text=TextPlan(kind="wordpiece", vocab=30522, length=32)),
        stages=(Stage(name="align", objective=BLIP2.align, trainable=ALIGN, steps=250_000, batch_size=1680,
                      optim=Optim(lr=1e-4, weight_decay=0.05, betas=(0.9, 0.98), warmup=2000, final=0.1)),))


def paper_opt() -> Preset:
    """Stage 2 with OPT-2.7B: 80,000 steps of batch 1920; captions behind "a photo of".

    OPT is not taught to read here and no Start brings it, so a run of this preset keeps one that is frozen at random; a taught one comes with
    a whole BLIP-2 by `polysense convert --layout hf` from its published files."""
    base, parts = paper(), ("vision", "norm_vision", "qformer")
    return base.but(
        starts=tuple(Start(into=n, from_="blip2", take=n, preset="paper") for n in parts),
        config=base.config.but(dim=0, words=None, language=opt(vocab=50304, length=2048, width=2560, depth=32, heads=32), start=2, end=50118,
                               prompt=(102, 1345, 9)),
        feed=base.feed.but(text=PromptPlan(vocab=50272, length=32)),
        stages=(Stage(name="speak", objective=BLIP2.speak, trainable=SPEAK, steps=80_000, batch_size=1920,
                      optim=Optim(lr=1e-4, weight_decay=0.05, betas=(0.9, 0.98), warmup=2000, final=0.5)),))


def paper_t5() -> Preset:
    """Stage 2 with FlanT5-XL: 80,000 steps of batch 1520.

    FlanT5 is not taught to read here and no Start brings it, so a run of this preset keeps one that is frozen at random; a taught one comes with
    a whole BLIP-2 by `polysense convert --layout hf` from its published files."""
    base = paper_opt()
    language = flan_t5(vocab=32128, width=2048, depth=24, heads=32, hidden=5120, dropout=0.1)
    return base.but(config=base.config.but(language=language, start=0, end=1, prompt=()), stages=(base.stages[0].but(batch_size=1520),),
                    feed=base.feed.but(text=PromptPlan(kind="t5", vocab=32128, length=32, describe="a photo of")))
