"""VL-BEiT: one stage, one kind of task. Pictures, texts and pairs of both are hidden in part, and one Multiway transformer says what was there.

Backbone and experts are VLMo's. Every batch holds as many pictures as texts as pairs, and every step adds three losses, each on its own third
(section 2.3); all three reach the shared attention:

    text    15 % of the words of texts alone are guessed
    image   visual codes of 40 % of the patches of pictures alone, hidden block by block, are named
    pair    of a caption 50 % of the words AND of its picture 40 % of the patches are hidden at once; words and codes are guessed from what both leave

There is no contrast and no matching. Visual codes come from a frozen tokenizer: which one the authors had is not said, so it is a choice
(`tokenizer`: `vq`, a discrete VAE as BEiT's, or `vqkd`, BEiT v2's). Afterwards the same weights are tuned as a dual encoder (`retrieval`), or as a
fusion encoder that answers questions (`vqa`). Data may be joined of pictures, texts and pairs (`Roles`); of captioned pictures alone, every third
sample gives its picture only, and every third its text only.
"""
from dataclasses import dataclass

from polysense.archetypes.answering_encoder import AnsweringEncoder, replying
from polysense.archetypes.unified_encoder import SHARED, SINGLE
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, Start, TextPlan, ViewPlan, final
from polysense.base.telling import Mixed, Roles, ToldFeed
from polysense.decoders.answers import KnownAnswers
from polysense.decoders.codes import CodeTarget
from polysense.decoders.dvae import DVAECodec, DVAEEncoder
from polysense.decoders.vq_codec import small_codec
from polysense.decoders.vqkd import UnitCodec
from polysense.decoders.words import WordHead
from polysense.mechanisms.mask_sampler import BlockMask
from polysense.mechanisms.word_mask import PureWordMask
from polysense.nn.head import Linear, TanhHead
from polysense.towers.multiway import Multiway, shared_multiway
from polysense.towers.shapes import plain_vit

card = Card(
    name="VL-BEiT", paper="Bao et al., VL-BEiT: Generative Vision-Language Pretraining, 2022", arxiv="2206.01127", year=2022,
    says="Learns from pictures, texts and pairs at once by guessing what is hidden in them, with one transformer for all three.",
    needs=("image", "text", "has|image", "question|image", "answer|image"), can=("encode_image", "encode_text", "generate_text", "guess_words"),
    official="microsoft/unilm",
)

PARAMETERS = 237_879_323                     # the encoder, VLMo's base of 175M; the words' head 0.6M, codes 6M, heads for tuning 1.8M; dVAE 54M


@final
class VLBEiT(AnsweringEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(AnsweringEncoder.Config):
        hide_pair: PureWordMask.Config

    def __init__(self, c: Config):
        super().__init__(c)
        self.hide_pair = c.hide_pair.build()

    def losses(self, batch: Batch) -> Losses:
        return self.masked_losses(batch, self.hide_pair)


MEAN, STD, HALF = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.5, 0.5, 0.5)
LEARNS = ("net.*", "hide.*", "codes.*", "words.*")


def config(net: Multiway.Config, target: CodeTarget.Config, hidden: int, least: int, mask: int, special: tuple[int, ...],
           answer: KnownAnswers.Config | None = None) -> VLBEiT.Config:
    """mask and special (padding, start, end) are ids; hidden and least are the block mask's."""
    wide, words = net.width, PureWordMask.Config(vocab=net.text.vocab, mask=mask, special=special)
    project = Linear.Config(into=wide, out=wide, std=0.02)
    return VLBEiT.Config(net=net, target=target, sampler=BlockMask.Config(hidden=hidden, least=least), words=WordHead.Config(vocab=net.text.vocab),
                         hide_text=words,
                         hide_pair=words.but(share=0.5), image_head=project, text_head=project, pooler=TanhHead.Config(into=wide, hidden=wide),
                         answer=answer)


def captions() -> Preset:
    """Captioned pictures alone, 64 px; then the single passes are tuned for retrieval, without which `encode_*` say nothing. Branches begin at full
    scale, and the tables of positions, which have to grow from zero, learn faster."""
    target = CodeTarget.Config(codec=small_codec(), size=32, mean=MEAN, std=STD, codec_mean=HALF, codec_std=HALF)
    optim = Optim(lr=1.5e-3, weight_decay=0.05, warmup=40, clip=3.0, lr_scale=(("*.relative.table", 20.0),))
    return Preset(
        data="scenes", starts=(Start(into="target.codec", from_="vq_vae", take="codec", preset="small"),),
        feed=Feed(image=ImagePlan(size=64, mean=MEAN, std=STD), text=TextPlan(kind="wordpiece", vocab=4096, length=40),
                  train_image=ViewPlan(size=64, scale=(0.6, 1.0))),
        config=config(shared_multiway(64, 8, 128, 4, 4, 1, 4096, 40, 1.0, 48), target, 25, 6, 4, (0, 1, 2)),
        stages=(Stage(name="masked", objective=VLBEiT.losses, trainable=LEARNS, steps=500, batch_size=96, optim=optim),
                Stage(name="retrieval", objective=VLBEiT.compare, embed=VLBEiT.embed, trainable=SINGLE, steps=200, batch_size=64,
                      optim=optim.but(lr=5e-4, warmup=20, lr_scale=()))))


def tiny() -> Preset:
    """`captions`, then answers to the questions of the same pictures."""
    base = captions()
    reply = Stage(name="reply", objective=VLBEiT.reply, trainable=replying(base.config.net), steps=200, batch_size=48,  # type: ignore[attr-defined]
                  optim=Optim(lr=3e-4, weight_decay=0.01, warmup=20, clip=3.0))
    return base.but(stages=(*base.stages, reply), config=base.config.but(answer=KnownAnswers.Config()))


def corpora() -> Preset:
    """Pictures, and pictures with captions, as two sets: half of every batch each. Without texts alone the last L-FFN learn nothing; texts are a
    third set, joined by `--data A+B+C` with three shares and `stages.0.trainable` as in `captions`."""
    base = captions()
    texts = tuple(f"net.body.blocks.{i}.text.*" for i in range(3))
    learns = (*SHARED, "net.image.*", "net.text.*", "net.body.blocks.*.image.*", "net.body.blocks.*.pair.*", *texts, "hide.*", "codes.*", "words.*")
    return base.but(data="tiny_imagenet40+natural_captions", stages=(base.stages[0].but(trainable=learns),), feed=ToldFeed(
        image=base.feed.image, train_image=base.feed.train_image, text=base.feed.text, told=(Roles(), Mixed(shares=(0.5, 0.5)))))


def with_vqkd(of: Preset) -> Preset:
    """Visual codes of BEiT v2's tiny tokenizer: 256, taught by CLIP."""
    target = CodeTarget.Config(codec=UnitCodec.Config(encoder=plain_vit(64, 8, 96, 3, 3), codes=256, width=16), size=64, mean=MEAN, std=STD,
                               codec_mean=HALF, codec_std=HALF)
    return of.but(starts=(Start(into="target.codec", from_="beit_v2", take="codec", preset="tiny_tokenizer"), *of.starts[1:]),
                  config=of.config.but(target=target))


VLBEiT.choices = {"tokenizer": {"vq": lambda p: p, "vqkd": with_vqkd}}


def tiny_vqkd() -> Preset:
    return with_vqkd(tiny())


def vqa() -> Preset:
    """Questions alone, on the weights of `captions`: `polysense train vl_beit --preset vqa --data daquar`."""
    base = tiny()
    return base.but(stages=base.stages[-1:], data="daquar", starts=tuple(
        Start(into=n, from_="vl_beit", take=n, preset="captions") for n in ("net", "words", "image_head", "text_head", "pooler")))


def paper() -> Preset:
    """Base: 480k steps of 2048 pictures, 2048 texts and 2048 pairs (section 3.1); tokenizer and depth of the experts are not given."""
    target = CodeTarget.Config(codec=DVAECodec.Config(encoder=DVAEEncoder.Config(codes=8192), decoder=None), size=112, mean=MEAN, std=STD)
    share: Spec = Mixed(shares=(1 / 3, 1 / 3, 1 / 3))
    return Preset(
        data="imagenet22k+wikipedia_bookcorpus+pairs_4m", starts=(Start(into="target.codec.encoder", from_="dalle_dvae", take="codec.encoder",
                                                                        preset="paper"),),
        feed=ToldFeed(image=ImagePlan(size=224, mean=MEAN, std=STD), train_image=ViewPlan(size=224, scale=(0.2, 1.0), flip=0.5),
                      text=TextPlan(kind="wordpiece", vocab=30522, length=128), told=(Roles(), share)),
        config=config(shared_multiway(224, 16, 768, 12, 12, 2, 30522, 128, drop_path=0.1), target, 75, 16, 103, (0, 101, 102)),
        stages=(Stage(name="masked", objective=VLBEiT.losses, trainable=LEARNS, steps=480_000, batch_size=6144,
                      optim=Optim(lr=2e-3, weight_decay=0.05, warmup=10_000, clip=3.0)),))


def retrieval() -> Preset:
    """The single passes of `paper`, tuned on Flickr30k (appendix): 50 epochs of batch 3072."""
    base = paper()
    return base.but(data="flickr30k", starts=(Start(into="", from_="vl_beit", preset="paper"),), feed=Feed(
        image=base.feed.image, train_image=ViewPlan(size=224, scale=(0.5, 1.0), flip=0.5), text=base.feed.text), stages=(
        Stage(name="retrieval", objective=VLBEiT.compare, embed=VLBEiT.embed, trainable=SINGLE, steps=50 * 29_000 // 3072, batch_size=3072,
              optim=Optim(lr=2e-5, weight_decay=0.05, warmup=50)),))
