"""VLMo: one transformer that is an image encoder, a text encoder, a dual encoder or a fusion encoder, as its feed-forward experts are switched.

Every block has ONE self-attention and a mixture of modality experts (equations 1 and 2): a token of a picture passes V-FFN, one of a text L-FFN, and
in the last blocks all tokens of a pair pass VL-FFN. Pictures or texts alone never meet another expert than their own. Positions are relative:
a table for pictures (BEiT's), one for texts, and two numbers for looks across.

It is trained stage by stage (section 3.4), so that pictures without texts and texts without pictures serve too:
    pictures   hidden patches are named by their visual codes (BEiT): attention and V-FFN learn
    words      hidden words are guessed from texts alone: L-FFN and what else belongs to texts learn, all that pictures use is frozen
    pairs      everything learns, by three losses:
        ITC   first tokens of pictures and of texts, each read alone, are contrasted; so are those that the last blocks made by VL-FFN; mean of both
        ITM   is it a pair? B true ones, B with a hard picture, B with a hard text, drawn by the ITC similarities of all ranks
        MLM   15 % of whole words are guessed from text and picture (weight 0.25)

Retrieval takes two passes (`encode_*`), a second look (`match_text`) and answers take the fusion pass and the pooled first token of the text. Answers
are classes: those that training meets become known one by one.
"""
from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.archetypes.answering_encoder import AnsweringEncoder, replying
from polysense.archetypes.unified_encoder import SHARED, paired, unit
from polysense.base.card import Card
from polysense.base.system import After, Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, Start, TextPlan, ViewPlan, final
from polysense.decoders.answers import KnownAnswers
from polysense.decoders.codes import CodeTarget
from polysense.decoders.dvae import DVAECodec, DVAEEncoder
from polysense.decoders.vq_codec import small_codec
from polysense.decoders.words import OwnWordHead
from polysense.mechanisms.mask_sampler import BlockMask
from polysense.mechanisms.word_mask import WholeWordMask
from polysense.nn.head import Linear, LinearBias, TanhHead
from polysense.objectives.contrastive import info_nce
from polysense.objectives.language import hidden_words
from polysense.objectives.matching import matching_loss, matching_pairs, similarities
from polysense.objectives.spread import gather, places, widest
from polysense.towers.multiway import Multiway, shared_multiway
from polysense.weights import vlmo

card = Card(
    name="VLMo", paper="Bao et al., VLMo: Unified Vision-Language Pre-Training with Mixture-of-Modality-Experts, NeurIPS 2022", arxiv="2111.02358",
    year=2022, says="One transformer for pictures, texts and both: fast search, an exact second look, and answers, by switching its experts.",
    needs=("image|text", "text|image", "word|image", "question|image|text", "answer|image|text"),
    can=("encode_image", "encode_text", "match_text", "generate_text", "guess_words"), official="microsoft/unilm",
)

PARAMETERS = 262_501_406                     # base: the encoder, published as 175M; heads of words 24M, codes 6M, pairs 3M; the dVAE's encoder 54M

weights = {"unilm": vlmo.LAYOUT}


@final
class VLMo(AnsweringEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(AnsweringEncoder.Config):
        hide_text: WholeWordMask.Config      # type: ignore[assignment]
        fused_image_head: Spec
        fused_text_head: Spec
        match_head: Spec                     # pooled -> (no, yes)

    def __init__(self, c: Config):
        super().__init__(c)
        self.fused_image_head, self.fused_text_head = c.fused_image_head.build(), c.fused_text_head.build()
        self.fused_log_scale = nn.Parameter(torch.tensor(log(c.scale)))
        self.match_head = c.match_head.build()

    def pictures(self, batch: Batch) -> Losses:
        """The first stage."""
        return Losses(codes=self.picture_loss(batch["image"]))

    def texts(self, batch: Batch) -> Losses:
        """The second stage."""
        return Losses(words=self.text_loss(batch["text"], batch["word"]))

    def pairs(self, batch: Batch) -> Losses:
        """The third stage."""
        image, text = batch["image"], batch["text"]
        (i, i_fused), (t, t_fused) = self.both_ways(image=image), self.both_ways(text=text)
        fused_scale = self.fused_log_scale.clamp(max=self.max_log_scale).exp()
        contrast = (info_nce(i, t, self.scale) + info_nce(i_fused, t_fused, fused_scale)) / 2
        with torch.no_grad():                # hard negatives are looked for among the pairs of all ranks
            at, wide = places(i), widest(text.shape[1], text.device)
            images, texts = gather(image, at), gather(F.pad(text, (0, wide - text.shape[1]), value=self.net.text.pad), at)
            found = matching_pairs(similarities(i, gather(t, at), self.scale), similarities(t, gather(i, at), self.scale), at.start)
        hidden, chosen = self.hide_text(text, batch["word"])
        guessed = self.word_logits(self.net(image, hidden).text[chosen])
        match = matching_loss(self.match_head(self.fused(images[found.image], texts[found.text])), found.truth)
        return Losses(contrast=contrast, match=match, words=hidden_words(guessed, text[chosen]))

    def both_ways(self, image: Tensor | None = None, text: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pictures or texts -> features [B,E] of their own experts, and of the experts for pairs in the last blocks; unit norm."""
        own, fused = self.net.branches(image, text)
        first, second = (self.text_head, self.fused_text_head) if image is None else (self.image_head, self.fused_image_head)
        return unit(first(own[:, 0])), unit(second(fused[:, 0]))

    def match_text(self, image: Tensor, text: Tensor) -> Tensor:
        """image [B,3,H,W] and text [B,L], or one of either for all of the other -> probability [B] that they belong together."""
        return self.match_head(self.fused(*paired(image, text))).float().softmax(-1)[:, 1]

    @torch.no_grad()
    def after_step(self, after: After) -> None:
        super().after_step(after)
        self.fused_log_scale.clamp_(max=self.max_log_scale)


IMAGE = (*SHARED, "net.image.*", "net.body.blocks.*.image.*", "hide.*", "codes.*")
TEXT = ("net.body.blocks.*.text.*", "net.text.*", "words.*")
HEADS = ("image_head.*", "text_head.*", "fused_*", "log_scale", "match_head.*")
PAIRS = ("net.*", "words.*", "pooler.*", *HEADS)

MEAN, STD, HALF = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.5, 0.5, 0.5)


def config(net: Multiway.Config, target: CodeTarget.Config, hidden: int, least: int, mask: int, special: tuple[int, ...],
           answer: KnownAnswers.Config | None = None) -> VLMo.Config:
    """mask and special (padding, start, end) are ids; hidden and least are the block mask's."""
    wide, vocab = net.width, net.text.vocab
    project = Linear.Config(into=wide, out=wide, std=0.02)
    return VLMo.Config(
        net=net, target=target, sampler=BlockMask.Config(hidden=hidden, least=least), words=OwnWordHead.Config(vocab=vocab),
        hide_text=WholeWordMask.Config(vocab=vocab, mask=mask, special=special), image_head=project, text_head=project, fused_image_head=project,
        fused_text_head=project, pooler=TanhHead.Config(into=wide, hidden=wide), match_head=LinearBias.Config(into=wide, out=2, std=0.02),
        answer=answer)


def captions() -> Preset:
    """All three stages on captioned pictures: the first reads their pictures alone, the second their texts. Branches begin at full scale, and the
    tables of positions, which have to grow from zero, learn faster."""
    fast = (("*.relative.table", 20.0),)
    target = CodeTarget.Config(codec=small_codec(), size=32, mean=MEAN, std=STD, codec_mean=HALF, codec_std=HALF)
    return Preset(
        data="scenes", starts=(Start(into="target.codec", from_="vq_vae", take="codec", preset="small"),),
        feed=Feed(image=ImagePlan(size=64, mean=MEAN, std=STD), text=TextPlan(kind="wordpiece", vocab=4096, length=40),
                  train_image=ViewPlan(size=64, scale=(0.6, 1.0))),
        config=config(shared_multiway(64, 8, 128, 4, 4, 1, 4096, 40, 1.0, 48), target, 25, 6, 4, (0, 1, 2)),
        stages=(Stage(name="pictures", objective=VLMo.pictures, trainable=IMAGE, steps=200, batch_size=64,
                      optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=20, clip=3.0, lr_scale=fast)),
                Stage(name="texts", objective=VLMo.texts, trainable=TEXT, steps=200, batch_size=64,
                      optim=Optim(lr=1.5e-3, weight_decay=0.01, warmup=20, clip=3.0)),
                Stage(name="pairs", objective=VLMo.pairs, trainable=PAIRS, weights=(("words", 0.25),), steps=400, batch_size=48,
                      optim=Optim(lr=7e-4, weight_decay=0.01, betas=(0.9, 0.98), warmup=40, clip=3.0, schedule="linear", lr_scale=fast))))


def tiny() -> Preset:
    """`captions`, then answers to the questions of the same pictures."""
    base = captions()
    reply = Stage(name="reply", objective=VLMo.reply, trainable=replying(base.config.net), steps=200, batch_size=48,  # type: ignore[attr-defined]
                  optim=Optim(lr=3e-4, weight_decay=0.01, warmup=20, clip=3.0))
    return base.but(stages=(*base.stages, reply), config=base.config.but(answer=KnownAnswers.Config()))


def vqa() -> Preset:
    """Questions alone, on the weights of `captions`: `polysense train vlmo --preset vqa --data daquar`."""
    base = tiny()
    return base.but(stages=base.stages[-1:], data="daquar",
                    starts=tuple(Start(into=n, from_="vlmo", take=n, preset="captions") for n in (
                        "net", "words", "image_head", "text_head", "pooler", "match_head")))


def paper() -> Preset:
    """Base: 12 blocks, VL-FFN in the last two, 200k steps of 1024 pairs of four million pictures (section 4.1), on `paper_texts`."""
    target = CodeTarget.Config(codec=DVAECodec.Config(encoder=DVAEEncoder.Config(codes=8192), decoder=None), size=112, mean=HALF, std=HALF)
    return Preset(
        data="cc3m+sbu+coco_captions+vg", starts=(Start(into="", from_="vlmo", preset="paper_texts"),),
        feed=Feed(image=ImagePlan(size=224, mean=HALF, std=HALF), train_image=ViewPlan(size=224, scale=(0.5, 1.0), flip=0.5),
                  text=TextPlan(kind="wordpiece", vocab=30522, length=40)),
        config=config(shared_multiway(224, 16, 768, 12, 12, 2, 30522, 40, drop_path=0.1), target, 75, 16, 103, (0, 101, 102)),
        stages=(Stage(name="pairs", objective=VLMo.pairs, trainable=PAIRS, weights=(("words", 0.25),), steps=200_000, batch_size=1024,
                      optim=Optim(lr=2e-4, weight_decay=0.01, betas=(0.9, 0.98), warmup=20_000, schedule="linear")),))


def paper_texts() -> Preset:
    """The second stage, on `paper_pictures`: Wikipedia and BookCorpus, texts of 196 tokens."""
    return paper().but(data="wikipedia+bookcorpus", **{"feed.text.length": 196, "config.net.text.length": 196}).but(
        starts=(Start(into="", from_="vlmo", preset="paper_pictures"),),
        stages=(Stage(name="texts", objective=VLMo.texts, trainable=TEXT, steps=500_000, batch_size=2048,
                      optim=Optim(lr=2e-4, weight_decay=0.01, betas=(0.9, 0.98), warmup=10_000, schedule="linear")),))


def paper_pictures() -> Preset:
    """The first stage: BEiT on ImageNet-22k, 150 epochs."""
    epoch = 14_197_122 // 2048
    return paper().but(data="imagenet22k", starts=(Start(into="target.codec.encoder", from_="dalle_dvae", take="codec.encoder", preset="paper"),),
                       stages=(Stage(name="pictures", objective=VLMo.pictures, trainable=IMAGE, steps=150 * epoch, batch_size=2048,
                                     optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=10 * epoch, clip=3.0)),))


def large() -> Preset:
    """24 blocks of width 1024, VL-FFN in the last three."""
    base = paper()
    return base.but(starts=(), config=config(shared_multiway(224, 16, 1024, 24, 16, 3, 30522, 40, drop_path=0.1),
                                             base.config.target, 75, 16, 103, (0, 101, 102))).but(**{"stages.0.optim.lr": 5e-5})  # type: ignore[attr-defined]
