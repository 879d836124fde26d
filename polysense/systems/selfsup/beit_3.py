"""BEiT-3: a picture is a foreign language. One objective, mask then predict, on pictures, texts and pairs; one Multiway transformer for every task.

    text    15 % of the words of texts alone        image   codes of 40 % of the patches of pictures alone, hidden block by block
    pair    50 % of the words and 40 % of the patches of a pair at once                                          (section 2.2)

Codes are those of BEiT v2's tokenizer. Without a contrast, a batch of 2048 pictures, 2048 texts and 2048 pairs is enough.

Two forms. `shared`, the paper's: one attention, experts for pictures and for texts in every block, one for pairs in the last three. `decoupled`, the
one whose weights were released (Magneto): every linear, norm and table of positions exists twice, a softmax goes over both, inner norms stand in
attention and MLP, and nothing is an expert for pairs.

For each task a head: `classify` on the mean of the patches; answers (`generate_text` with a question) on the picture's pooled first token; two
pictures and a text (`reason`) on the first tokens of both passes; retrieval (`encode_*`, tuned by contrast); captions (`generate_text` without a
question): words see the picture and the words before them, the picture sees no word; trained as hidden words, written by appending [MASK].
"""
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.archetypes.unified_encoder import UnifiedEncoder
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import After, Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, Start, TextPlan, ViewPlan, final
from polysense.base.telling import Mixed, Roles, ToldFeed
from polysense.decoders.answers import KnownAnswers
from polysense.decoders.appended import AppendedMask
from polysense.decoders.codes import CodeTarget
from polysense.decoders.vqkd import UnitCodec
from polysense.decoders.words import PlainWordHead
from polysense.mechanisms.mask_sampler import BlockMask
from polysense.mechanisms.word_mask import PureWordMask
from polysense.nn.head import Linear, NormLinear, NormMLP, NormTanh
from polysense.nn.init import RescaledInit, SubNormInit
from polysense.nn.mlp import MLP
from polysense.nn.multiway import DecoupledBlock, MultiwayBlock, MultiwayTransformer
from polysense.nn.norm import LayerNorm
from polysense.nn.subnorm import SubNormAttention, SubNormMLP
from polysense.objectives.classify import softmax_ce
from polysense.objectives.language import hidden_words
from polysense.objectives.spread import gather, widest
from polysense.towers.decoding import Greedy
from polysense.towers.multiway import ImageEmbedding, Multiway, TextEmbedding, prefix_sees
from polysense.towers.shapes import plain_vit
from polysense.weights import beit_3

T = TypeVar("T")

card = Card(
    name="BEiT-3", paper="Wang et al., Image as a Foreign Language: BEiT Pretraining for Vision and Vision-Language Tasks, CVPR 2023",
    arxiv="2208.10442", year=2023,
    says="One encoder for pictures, texts and both: search, labels, answers, captions, learned by guessing what is hidden.",
    needs=("image", "text|image", "has|image", "question|image", "answer|image", "label|image"),
    can=("encode_image", "encode_text", "guess_words", "generate_text", "classify"), official="microsoft/unilm",
)

PARAMETERS = 2_038_003_873                   # published as 1.9B: 692M V-FFN, 692M L-FFN, 52M VL-FFN, 317M attention, 90M words; head of words, codec

weights = beit_3.LAYOUTS


@final
class BEiT3(UnifiedEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(UnifiedEncoder.Config):
        hide_pair: PureWordMask.Config
        hide_caption: PureWordMask.Config    # hides ends too: that is how they are learned
        start: int = 1
        end: int = 2
        pooler: NormTanh.Config | None = None
        answer: KnownAnswers.Config | None = None
        label: NormLinear.Config | None = None
        reasoner: NormMLP.Config | None = None

    def __init__(self, c: Config):
        super().__init__(c)
        self.hide_pair, self.hide_caption = c.hide_pair.build(), c.hide_caption.build()
        self.pooler, self.label, self.reasoner = (None if h is None else h.build() for h in (c.pooler, c.label, c.reasoner))
        self.answer = c.answer.but(width=c.net.width).build() if c.answer is not None else None
        self.start, self.end = c.start, c.end

    def losses(self, batch: Batch) -> Losses:
        return self.masked_losses(batch, self.hide_pair)

    def caption(self, batch: Batch) -> Losses:
        """Fine-tuning for captions: hidden words, each guessed from the picture and the words before it."""
        image, text = batch["image"], batch["text"]
        hidden, chosen = self.hide_caption(text)
        grid = self.net.grid_of(image)
        said = self.net(image, hidden, sees=prefix_sees(1 + grid[0] * grid[1], text.shape[1], text.device)).text
        return Losses(caption=hidden_words(self.word_logits(said[chosen]), text[chosen]))

    def classes(self, batch: Batch) -> Losses:
        """Fine-tuning for labels."""
        return Losses(label=softmax_ce(self.classify(batch["image"]), batch["label"], 0.1))

    def classify(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> logits [B,C]: the mean of the patches, normed."""
        return head(self.label, "labels", "finetune")(self.net(image).image[:, 1:].mean(1))

    def asked(self, image: Tensor, text: Tensor) -> Tensor:
        """Pairs -> [B,D], the picture's first token behind the fusion pass, pooled."""
        return head(self.pooler, "answers", "vqa")(self.net(image, text).image[:, 0])

    def reply(self, batch: Batch) -> Losses:
        """Fine-tuning for questions: the answer as a class."""
        answer = batch["answer"]
        said = head(self.answer, "answers", "vqa").loss(self.asked(batch["image"], batch["question"]), answer)
        return Losses(answer=said).keeping(answer=gather(F.pad(answer, (0, widest(answer.shape[1], answer.device) - answer.shape[1]))))

    def reason(self, images: Tensor, text: Tensor) -> Tensor:
        """images [B,2,3,H,W], text [B,L] -> logits [B,2] (false, true): first tokens of picture and text, of both passes."""
        seen = [self.net(image, text) for image in images.unbind(1)]
        return head(self.reasoner, "two pictures", "nlvr2")(torch.cat([first[:, 0] for one in seen for first in one], -1))

    def judge(self, batch: Batch) -> Losses:
        """Fine-tuning for two pictures and a text (NLVR2). UserError for data without pictures in pairs."""
        if "images" not in batch:
            raise UserError("these data hold no pairs of pictures", "give batches with images [B,2,3,H,W], text and label")
        return Losses(truth=softmax_ce(self.reason(batch["images"], batch["text"]), batch["label"]))

    @torch.no_grad()
    def generate_text(self, image: Tensor, prompt: Tensor, *, max_new: int, how: Spec | None = None) -> Tensor:
        """image [B,3,H,W], prompt [B,P] ids, right-padded -> new ids [B,N]. A system that was tuned for answers says that to a question; else a
        prompt is how the caption begins, and nothing is the beginning of any."""
        pad, special = self.net.text.pad, torch.tensor([self.net.text.pad, self.start, self.end], device=prompt.device)
        if max_new < 1 or len(prompt) != len(image):
            raise UserError(f"max_new={max_new}, {len(prompt)} prompts for {len(image)} pictures", "ask for at least one word, with one prompt each")
        given = [row[~torch.isin(row, special)].tolist() for row in prompt]
        if self.answer is not None and bool(self.answer.words.any()) and all(given):
            return self.answer.say(self.asked(image, prompt))[:, :max_new]
        out: dict[int, Tensor] = {}
        for words in {tuple(g): None for g in given}:                    # all pictures whose captions begin alike, at once
            rows = [i for i, g in enumerate(given) if tuple(g) == words]
            text = torch.tensor([[self.start, *words]], device=image.device).expand(len(rows), -1)
            if (room := self.net.text.length - text.shape[1]) < 1:
                raise UserError(f"a beginning of {len(words)} tokens", f"texts have at most {self.net.text.length}: give a shorter one")
            writer = AppendedMask(self.net, self.word_logits, image[rows], text, self.hide_caption.mask)
            new = (how or Greedy.Config()).build()(writer.logits(), writer, max_new=min(max_new, room), end=self.end, pad=pad)
            out |= dict(zip(rows, new, strict=True))
        return nn.utils.rnn.pad_sequence([out[i] for i in range(len(given))], batch_first=True, padding_value=pad)

    @torch.no_grad()
    def after_step(self, after: After) -> None:
        super().after_step(after)
        if "answer" in after.keep and self.answer is not None:
            self.answer.learn(after.keep["answer"])


def head(it: T | None, what: str, preset: str) -> T:
    """A head, or UserError where there is none."""
    if it is None:
        raise UserError(f"this BEiT-3 has no head for {what}", f"train the preset {preset}")
    return it


MEAN, STD, HALF = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.5, 0.5, 0.5)
LEARNS = ("net.*", "hide.*", "codes.*", "words.*")


def shared(size: int, patch: int, width: int, depth: int, heads: int, fused: int, vocab: int, length: int, *, hidden: int = 0, pad: int = 0,
           drop_path: float = 0.0) -> Multiway.Config:
    """The paper's form; `fused`: so many blocks, the last ones, have an expert for pairs."""
    norm = LayerNorm.Config(eps=1e-6)
    return Multiway.Config(
        image=ImageEmbedding.Config(size=size, patch=patch, position="learned"),
        text=TextEmbedding.Config(vocab=vocab, length=length, position="learned", pad=pad),
        body=MultiwayTransformer.Config(width=width, depth=depth, heads=heads, norm=norm, fused=fused, drop_path=drop_path,
                                        init=RescaledInit.Config(), block=MultiwayBlock.Config(mlp=MLP.Config(hidden=hidden), norm=norm)))


def decoupled(size: int, patch: int, width: int, depth: int, heads: int, vocab: int, length: int, *, pad: int = 0,
              drop_path: float = 0.0) -> Multiway.Config:
    """The released form; the first position of either modality is row 2 of its table."""
    norm = LayerNorm.Config(eps=1e-5)
    return Multiway.Config(
        image=ImageEmbedding.Config(size=size, patch=patch, position="learned", skip=2),
        text=TextEmbedding.Config(vocab=vocab, length=length, position="learned", skip=2, pad=pad),
        body=MultiwayTransformer.Config(
            width=width, depth=depth, heads=heads, norm=norm, norms="two", drop_path=drop_path, init=SubNormInit.Config(),
            block=DecoupledBlock.Config(attn=SubNormAttention.Config(norm_inner=norm), mlp=SubNormMLP.Config(norm_inner=norm), norm=norm)))


def config(net: Multiway.Config, target: CodeTarget.Config, hidden: int, least: int, mask: int, special: tuple[int, int, int]) -> BEiT3.Config:
    """mask and special (padding, start, end) are ids; hidden and least are the block mask's."""
    wide, words, (pad, start, end) = net.width, PureWordMask.Config(vocab=net.text.vocab, mask=mask, special=special), special
    project = Linear.Config(into=wide, out=wide, std=0.02)
    return BEiT3.Config(net=net, target=target, sampler=BlockMask.Config(hidden=hidden, least=least),
                        words=PlainWordHead.Config(vocab=net.text.vocab), hide_text=words,
                        hide_pair=words.but(share=0.5), hide_caption=words.but(share=0.6, special=(pad, start)), start=start, end=end,
                        image_head=project, text_head=project)


def reads(net: Multiway.Config, how: str) -> tuple[str, ...]:
    """What of the encoder "single" passes read, and what "pair" passes do; all of it where it is decoupled."""
    if net.body.norms == "two":
        return ("net.*",)
    first = net.body.depth - net.body.fused
    experts = [(i, n) for i in range(net.body.depth) for n in ("image", "text") if how == "single" or i < first]
    return ("net.image.*", "net.text.*", "net.body.norm.*", "net.body.blocks.*.norm1.*", "net.body.blocks.*.attn.*",
            *(f"net.body.blocks.{i}.{n}.*" for i, n in experts),
            *(f"net.body.blocks.{i}.pair.*" for i in range(first, net.body.depth) if how == "pair"))


def tuning(net: Multiway.Config, retrieval: Stage, caption: Stage) -> tuple[Stage, Stage]:
    """The stages behind pre-training, with what each of them trains."""
    return (retrieval.but(name="retrieval", objective=BEiT3.compare, embed=BEiT3.embed,
                          trainable=(*reads(net, "single"), "image_head.*", "text_head.*", "log_scale")),
            caption.but(name="caption", objective=BEiT3.caption, trainable=(*reads(net, "pair"), "words.*")))


def tiny() -> Preset:
    """The shared form on captioned pictures, 64 px, every third for its picture alone, every third for its text alone; codes of BEiT v2's tiny
    tokenizer. Then tuned for retrieval and for captions."""
    target = CodeTarget.Config(codec=UnitCodec.Config(encoder=plain_vit(64, 8, 96, 3, 3), codes=256, width=16), size=64, mean=MEAN, std=STD,
                               codec_mean=HALF, codec_std=HALF)
    net = shared(64, 8, 128, 4, 4, 1, 4096, 40)
    masked = Stage(name="masked", objective=BEiT3.losses, trainable=LEARNS, steps=500, batch_size=96,
                   optim=Optim(lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98), warmup=50, clip=3.0))
    tuned = masked.but(**{"steps": 200, "batch_size": 64, "optim.lr": 5e-4, "optim.warmup": 20})
    return Preset(
        data="scenes", starts=(Start(into="target.codec", from_="beit_v2", take="codec", preset="tiny_tokenizer"),),
        feed=Feed(image=ImagePlan(size=64, mean=MEAN, std=STD), text=TextPlan(kind="wordpiece", vocab=4096, length=40),
                  train_image=ViewPlan(size=64, scale=(0.6, 1.0))),
        config=config(net, target, 25, 6, 4, (0, 1, 2)), stages=(masked, *tuning(net, tuned, tuned)))


def tiny_decoupled() -> Preset:
    """The released form."""
    base, net = tiny(), decoupled(64, 8, 128, 4, 4, 4096, 40)
    return base.but(**{"config.net": net}).but(stages=(base.stages[0], *tuning(net, *base.stages[1:])))


BEiT3.choices = {"form": {"shared": lambda p: p, "decoupled": lambda p: tiny_decoupled().but(data=p.data)}}


def tuned(base: Preset, stage: Stage, start: str, **more: Any) -> Preset:
    """One of its heads, on the weights of another preset."""
    made: Any = base.config.but(**more)
    return base.but(config=made, stages=(stage,), starts=tuple(
        Start(into=n, from_="beit_3", take=n, preset=start) for n in ("net", "hide", "words", "image_head", "text_head")))


def vqa() -> Preset:
    """Questions, on the weights of `tiny`: `polysense train beit_3 --preset vqa --data daquar`."""
    base, net = tiny(), tiny().config.net  # type: ignore[attr-defined]
    stage = base.stages[-1].but(name="reply", objective=BEiT3.reply, trainable=(*reads(net, "pair"), "pooler.*", "answer.*"))
    return tuned(base, stage, "tiny", pooler=NormTanh.Config(into=128), answer=KnownAnswers.Config())


def finetune() -> Preset:
    """Labels, on the weights of `tiny`: `polysense train beit_3 --preset finetune --data cifar10 config.label.out=10`."""
    base, net = tiny(), tiny().config.net  # type: ignore[attr-defined]
    alone = tuple(n for n in reads(net, "single") if not n.startswith("net.text.") and not n.endswith(".text.*"))
    stage = base.stages[-1].but(name="classes", objective=BEiT3.classes, trainable=(*alone, "label.*"))
    return tuned(base, stage, "tiny", label=NormLinear.Config(into=128, out=12, eps=1e-5))


def vqkd(size: int) -> CodeTarget.Config:
    """BEiT v2's tokenizer, reading pictures of so many pixels."""
    return CodeTarget.Config(codec=UnitCodec.Config(encoder=plain_vit(224, 16, 768, 12, 12), codes=8192, width=32), size=size, mean=MEAN, std=STD,
                             codec_mean=HALF, codec_std=HALF)


def paper() -> Preset:
    """Giant: 40 blocks of 1408, one million steps of 2048 pictures, 2048 texts and 2048 pairs (section 3 and table 11)."""
    net = shared(224, 14, 1408, 40, 16, 3, 64_000, 128, hidden=6144, pad=1, drop_path=0.1)
    return Preset(
        data="imagenet21k+text_160gb+pairs_21m", starts=(Start(into="target.codec", from_="beit_v2", take="codec", preset="paper_tokenizer"),),
        feed=ToldFeed(image=ImagePlan(size=224, mean=MEAN, std=STD), train_image=ViewPlan(size=224, scale=(0.2, 1.0), flip=0.5),
                      text=TextPlan(kind="roberta", vocab=64_000, length=128), told=(Roles(), Mixed(shares=(1 / 3, 1 / 3, 1 / 3)))),
        config=config(net, vqkd(256), 98, 21, 63_999, (1, 0, 2)),
        stages=(Stage(name="masked", objective=BEiT3.losses, trainable=LEARNS, steps=1_000_000, batch_size=6144,
                      optim=Optim(lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98), eps=1e-6, warmup=10_000)),))


def base() -> Preset:
    """The released base: decoupled, 64,010 words of which 64,001 is the mask."""
    return paper().but(config=config(decoupled(224, 16, 768, 12, 12, 64_010, 1022, pad=1, drop_path=0.1), vqkd(224), 75, 16, 64_001, (1, 0, 2)),
                       **{"feed.text.vocab": 64_010})


def base_heads() -> Preset:
    """The same with all heads of the released tuned models: 1000 labels, 3129 answers, two pictures and a text."""
    stage = paper().stages[0].but(name="caption", objective=BEiT3.caption, trainable=("net.*", "words.*"), steps=10 * 113_000 // 256, batch_size=256)
    return tuned(base(), stage, "base", pooler=NormTanh.Config(into=768), answer=KnownAnswers.Config(room=3129),
                 label=NormLinear.Config(into=768, out=1000, eps=1e-5), reasoner=NormMLP.Config(into=4 * 768, hidden=2 * 768, out=2))
