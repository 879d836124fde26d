"""ALBEF: align pictures and texts before fusing them, and learn from a momentum copy of oneself.

One BERT is cut in two: its first half encodes the text alone, its second half, with a cross-attention inserted into every block, reads all
image tokens. Three losses (section 3.2):

    ITC  contrast of the unimodal features against the momentum features of the batch and of two queues; s = cosine / temperature
    ITM  is it a pair? B true pairs, B hard pictures, B hard texts, drawn in proportion to exp(s) within the batch
    MLM  15 % of the words are guessed from the text and the picture

Momentum distillation (section 3.3, equations 6 and 7): web texts are noisy, so the targets of ITC and MLM are (1 - alpha) hard + alpha soft,
the soft ones by a copy of the network that follows as theta_m <- 0.995 theta_m + 0.005 theta. alpha climbs linearly from 0 to 0.4 during the
first epoch. The copy moves after each step: before the next one's momentum features, as released. ITC, MLM and the soft targets each bound
the mutual information of two views of one content from below (section 4): the copy supplies further views.

Retrieval ranks by cosine and re-ranks the best by `match_text` (`rerank=` of the retrieval exam). Questions are answered by a decoder that
starts as a copy of the fusion encoder and reads its output; `ground_text` shows where in the picture a text is found.
"""
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polysense.archetypes.fusion_encoder import FusionEncoder, Net
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.plan import AugmentOnlyPlan
from polysense.base.system import After, Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, Start, TextPlan, ViewPlan, final
from polysense.decoders.caption import CaptionDecoder
from polysense.decoders.words import WordHead
from polysense.mechanisms.queue import Queue
from polysense.mechanisms.teacher import Teacher
from polysense.mechanisms.word_mask import WordMask
from polysense.nn.attention import Attention
from polysense.nn.block import PostNorm, PreNorm
from polysense.nn.build import build
from polysense.nn.head import Absent, LinearBias
from polysense.nn.norm import LayerNorm
from polysense.nn.residual import Basic, Stem
from polysense.nn.transformer import Transformer, UpperBlocks
from polysense.objectives.distil import distilled_contrast, distilled_words
from polysense.objectives.language import labels_of, next_token, token_log_likelihood
from polysense.objectives.matching import matching_loss, matching_pairs, similarities
from polysense.objectives.spread import gather
from polysense.towers.bert import Bert
from polysense.towers.resnet import ResNet
from polysense.towers.vit import ViT
from polysense.weights import albef as albef_weights
from polysense.weights import albef_vqa

card = Card(
    name="ALBEF", paper="Li et al., Align before Fuse: Vision and Language Representation Learning with Momentum Distillation, NeurIPS 2021",
    arxiv="2107.07651", year=2021,
    says="Aligns pictures and noisy texts, then fuses them: search with an exact second look, answers to questions, and where a phrase is seen.",
    needs=("image", "text|question", "question|text", "answer|text"),
    can=("encode_image", "encode_text", "match_text", "ground_text", "generate_text"), official="salesforce/ALBEF",
)

PARAMETERS = 209_500_000                     # section 3.1: BERT 123.7M with its cross-attention, ViT-B/16 85.8M

weights = {"albef": albef_weights.LAYOUT, "vqa": albef_vqa.LAYOUT}


@final
class ALBEF(FusionEncoder):
    ramp: Tensor                             # how far alpha has climbed, 0 to 1

    @dataclass(frozen=True, kw_only=True)
    class Config(FusionEncoder.Config):
        hide: WordMask.Config
        words: Spec                          # a WordHead on the fused states
        queue: Queue.Config                  # one for each modality
        teacher: Teacher.Config
        answer: CaptionDecoder.Config | None = None
        temperature: float = 0.07
        bounds: tuple[float, float] = (0.001, 0.5)
        alpha: float = 0.4                   # weight of the soft targets
        ramp: int                            # steps of its linear climb from 0: the first epoch

    def __init__(self, c: Config):
        super().__init__(c)
        self.hide, self.words = c.hide.build(), build(c.words, width=c.text.width, vocab=c.text.vocab)  # type: ignore[attr-defined]
        self.temperature = nn.Parameter(torch.tensor(c.temperature))
        self.image_queue, self.text_queue = c.queue.build(), c.queue.build()
        self.register_buffer("ramp", torch.zeros(()))
        self.answer = c.answer.build() if c.answer is not None else None
        self.bounds, self.alpha, self.climb = c.bounds, c.alpha, c.ramp
        self.teacher = c.teacher.of(nn.ModuleDict(self.whole))

    @property
    def whole(self) -> dict[str, nn.Module]:
        """Everything that the teacher copies: all but the matching head."""
        return {**self.net, "words": self.words}

    @property
    def scale(self) -> Tensor:
        """1 / temperature."""
        return 1 / self.temperature

    def pretrain(self, batch: Batch) -> Losses:
        net, twin, image, text = self.whole, self.teacher.module, batch["image"], batch["text"]
        seen, said, alpha = self.vision(image), self.text(text), self.alpha * self.ramp
        hidden, chosen = self.hide(text)
        with torch.no_grad():                # the copy has no gradient; its dropout differs from the network's, as released
            seen_m, said_m = twin["vision"](image), twin["text"](text)
            image_m, text_m = self.features(twin, seen_m, said_m)
            soft = self.guess(twin, seen_m.tokens, hidden, chosen)
        i, t = self.features(net, seen, said)
        texts, images = torch.cat([text_m, self.text_queue.keys]), torch.cat([image_m, self.image_queue.keys])
        contrast = (distilled_contrast(i, texts, image_m, self.scale, alpha) + distilled_contrast(t, images, text_m, self.scale, alpha)) / 2
        pairs = matching_pairs(similarities(i, text_m, self.scale), similarities(t, image_m, self.scale))
        fused = self.fuse(net, seen.tokens[pairs.image], said.tokens[pairs.text], said.mask[pairs.text])
        return Losses(contrast=contrast, match=matching_loss(self.match_head(fused[:, 0]), pairs.truth),
                      words=distilled_words(self.guess(net, seen.tokens, hidden, chosen), text[chosen], soft, alpha)
                      ).keeping(image_key=gather(image_m), text_key=gather(text_m))

    def guess(self, net: Net, image: Tensor, text: Tensor, chosen: Tensor) -> Tensor:
        """Image tokens [B,T,.] and corrupted text [B,L] -> logits [N,V] of the N words that are chosen [B,L]."""
        said = net["text"](text)
        return net["words"](self.fuse(net, image, said.tokens, said.mask)[chosen], net["text"].embed.weight)

    def reply(self, batch: Batch) -> Losses:
        """Fine-tuning for questions (section 3.4): the decoder reads the fused question and writes the answer."""
        source, mask = self.read_question(batch["image"], batch["question"])
        text = batch["answer"]
        return Losses(answer=next_token(self.decoder(text, source, mask), labels_of(text, text != self.decoder.pad)))

    @property
    def decoder(self) -> CaptionDecoder:
        if self.answer is None:
            raise UserError("this ALBEF has no answer decoder", "train the preset tiny or vqa on data with questions")
        return self.answer

    def read_question(self, image: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        """image [B,3,H,W], question [B,L] -> fused states [B,L,D] and mask [B,L]."""
        said = self.text(question)
        return self.fuse(self.net, self.vision(image).tokens, said.tokens, said.mask), said.mask

    def generate_text(self, image: Tensor, prompt: Tensor, *, max_new: int) -> Tensor:
        """image [B,3,H,W], prompt [B,L] a question -> ids [B,N] of its answer, N <= max_new, up to and with the end token."""
        decoder = self.decoder
        return decoder.write(*self.read_question(image, prompt), max_new=max_new)

    @torch.no_grad()
    def rank_answers(self, image: Tensor, question: Tensor, answers: Tensor, most: int = 128) -> Tensor:
        """answers [A,L] -> log-likelihood [B,A]; only the `most` whose first word is likeliest are read to the end, the others get -inf."""
        decoder, (source, mask) = self.decoder, self.read_question(image, question)
        b, k = len(source), min(most, len(answers))
        first = decoder(answers[:1, :1].expand(b, -1), source, mask)[:, 0].log_softmax(-1)[:, answers[:, 1]]
        best = first.topk(k, 1).indices
        text = answers[best.flatten()]
        logits = decoder(text, source.repeat_interleave(k, 0), mask.repeat_interleave(k, 0))
        scores = token_log_likelihood(logits, labels_of(text, text != decoder.pad))
        return torch.full_like(first, -torch.inf).scatter(1, best, scores.unflatten(0, (b, k)))

    def after_start(self) -> None:
        self.teacher.refresh(nn.ModuleDict(self.whole))
        self.follow()

    @torch.no_grad()
    def after_step(self, after: After) -> None:
        self.temperature.clamp_(*self.bounds)
        if "image_key" in after.keep:
            self.image_queue.push(after.keep["image_key"])
            self.text_queue.push(after.keep["text_key"])
            self.teacher.move(nn.ModuleDict(self.whole), after.progress)
            self.ramp.fill_(min(1.0, after.step / self.climb))
            self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """While the fusion encoder trains, the answer decoder is a copy of it: that is where its own training begins."""
        if self.answer is not None and not isinstance(self.words, Absent):
            self.answer.text.body.load_state_dict(self.fusion.state_dict())
            self.answer.words.load_state_dict(self.words.state_dict())
            for name in ("embed", "kind", "norm_pre"):
                getattr(self.answer.text, name).load_state_dict(getattr(self.text, name).state_dict())
            self.answer.text.position.data.copy_(self.text.position)


PRETRAINED = ("vision.*", "text.*", "fusion.*", "image_head.*", "text_head.*", "match_head.*", "words.*", "temperature")
ANSWERING = ("vision.*", "text.*", "fusion.*", "answer.*")


def bert(vocab: int, length: int, width: int, depth: int, heads: int, dropout: float = 0.0, cross: Attention.Config | None = None) -> Bert.Config:
    norm = LayerNorm.Config(eps=1e-12)
    block = PostNorm.Config(norm=norm, attn=Attention.Config(dropout=dropout), dropout=dropout, cross=cross)
    kind = Transformer.Config if cross is None else UpperBlocks.Config
    return Bert.Config(vocab=vocab, length=length, norm_pre=norm, dropout=dropout,
                       body=kind(width=width, depth=depth, heads=heads, norm=None, block=block))


def config(vision: ResNet.Config | ViT.Config, text: Bert.Config, depth: int, dim: int, *, mask: int, special: tuple[int, int, int], queue: int,
           ramp: int, momentum: float = 0.995) -> ALBEF.Config:
    """`depth` fusion blocks over a text tower; mask and special (padding, start, end) are ids."""
    wide, dropout = text.width, text.dropout
    cross = Attention.Config(source=vision.width, dropout=dropout)
    fusion = bert(text.vocab, text.length, wide, depth, text.body.heads, dropout, cross)
    return ALBEF.Config(
        vision=vision, text=text, fusion=fusion.body, words=WordHead.Config(vocab=text.vocab),
        hide=WordMask.Config(vocab=text.vocab, mask=mask, special=special),
        image_head=LinearBias.Config(into=vision.width, out=dim, std=0.02), text_head=LinearBias.Config(into=wide, out=dim, std=0.02),
        match_head=LinearBias.Config(into=wide, out=2, std=0.02), queue=Queue.Config(size=queue, width=dim),
        teacher=Teacher.Config(momentum=momentum), ramp=ramp)


def answering(of: Any) -> ALBEF.Config:
    """The same with an answer decoder of the fusion encoder's form. of: an ALBEF.Config."""
    _, start, end = of.hide.special
    if of.vision.width != of.text.width:
        raise UserError("the answer decoder starts as a copy of the fusion encoder", "give image and text tower one width")
    return of.but(answer=CaptionDecoder.Config(text=of.text.but(body=of.fusion), words=of.words, start=start, end=end))


def captions() -> Preset:
    """Pre-training alone: data with captions are enough. Convolutions see more in few pictures than a ViT."""
    tower = ResNet.Config(layers=(1, 1, 1), base=48, stem=Stem.Config(kernel=3, stride=2, pool=0), block=Basic.Config())
    return Preset(
        data="scenes", feed=Feed(image=ImagePlan(size=64), text=TextPlan(kind="wordpiece", vocab=4096, length=48),
                                 train_image=ViewPlan(size=64, scale=(0.6, 1.0), flip=0.5)),
        config=config(tower, bert(4096, 48, 192, 2, 3), 2, 128, mask=4, special=(0, 1, 2), queue=1024, ramp=60, momentum=0.99),
        stages=(Stage(name="pretrain", objective=ALBEF.pretrain, trainable=PRETRAINED, steps=400, batch_size=64,
                      optim=Optim(lr=5e-4, weight_decay=0.02, warmup=40, clip=1.0)),))


def tiny() -> Preset:
    """`captions`, then the answer decoder on the questions of the same pictures."""
    base = captions()
    reply = Stage(name="reply", objective=ALBEF.reply, trainable=ANSWERING, steps=300, batch_size=64,
                  optim=Optim(lr=3e-4, weight_decay=0.02, warmup=20, clip=1.0))
    return base.but(config=answering(base.config), stages=(*base.stages, reply))


def pretrained(preset: str) -> tuple[Start, ...]:
    """The weights of a preset of the first stage."""
    return tuple(Start(into=n, from_="albef", take=n, preset=preset) for n in (
        "vision", "text", "fusion", "image_head", "text_head", "match_head", "words"))


def vqa() -> Preset:
    """Questions alone, on the weights of `captions`: `polysense train albef --preset vqa --data daquar`."""
    base = tiny()
    return base.but(stages=base.stages[1:], data="daquar", starts=pretrained("captions"))


def view(size: int, least: float) -> AugmentOnlyPlan:
    """RandAugment without changes of colour (section 3.5): two operations of magnitude 7, as released."""
    return AugmentOnlyPlan(size=size, scale=(least, 1.0), flip=0.5, operations=2, magnitude=7.0, vary=0.0, erase=0.0, only=(
        "autocontrast", "equalize", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"))


def paper() -> Preset:
    """ViT-B/16 and BERT-base, whose first half becomes the text encoder and whose second the fusion encoder; 30 epochs of 14M pictures with 512 pairs
    a batch (sections 3.1 and 3.5). The ViT should begin as a DeiT: read one from a published file."""
    norm, epoch = LayerNorm.Config(eps=1e-6), 14_100_000 // 512
    vision = ViT.Config(image_size=256, patch=16, body=Transformer.Config(width=768, depth=12, heads=12, norm=norm, block=PreNorm.Config(norm=norm)))
    return Preset(
        data="coco_captions+vg+cc3m+sbu+cc12m", starts=tuple(Start(into=into, from_="bert", take=take, preset="paper") for into, take in (
            ("text", "text"), ("fusion", "text.body"), ("words", "predict"))),
        feed=Feed(image=ImagePlan(size=256, fit="squash"), train_image=view(256, 0.2),
                  text=TextPlan(kind="wordpiece", vocab=30522, length=30)),
        config=config(vision, bert(30522, 512, 768, 6, 12, dropout=0.1), 6, 256, mask=103, special=(0, 101, 102), queue=65_536, ramp=epoch),
        stages=(Stage(name="pretrain", objective=ALBEF.pretrain, trainable=PRETRAINED, steps=30 * epoch, batch_size=512,
                      optim=Optim(lr=1e-4, weight_decay=0.02, warmup=1000, final=0.1)),))


def paper_vqa() -> Preset:
    """The answer decoder on VQA 2.0 at 384 px, 8 epochs of batch 256 (appendix B)."""
    base = paper().but(**{"config.vision.image_size": 384, "feed.image.size": 384, "feed.train_image": view(384, 0.5)})
    stage = Stage(name="reply", objective=ALBEF.reply, trainable=ANSWERING, steps=8 * 1_000_000 // 256, batch_size=256,
                  optim=Optim(lr=2e-5, weight_decay=0.02, final=0.05))
    return base.but(config=answering(base.config), data="vqa", stages=(stage,), starts=pretrained("paper"))
