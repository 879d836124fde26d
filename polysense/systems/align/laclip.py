"""LaCLIP: CLIP on captions that a language model has said in other words.

Before training, M = 4 rewrites are made of every caption by in-context learning: an instruction, three examples of a pool (source => target),
the caption; one rewrite for each pool (`data.rewrites`). In training each picture meets, at every step, one of its M + 1 texts, drawn alike
(`Rewrites` in the feed):

    loss = CLIP's symmetric cross-entropy of (augmented picture, drawn text)                            (equation 3)

Nothing else changes: text augmentation, as strong as that of pictures, in place of one fixed sentence. Without a language model, files of ready
rewrites or a set of rules stand in; the rules only reword, where a model also adds what it knows.
"""
from dataclasses import dataclass

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.card import Card
from polysense.base.system import ImagePlan, Optim, Preset, Stage, TextPlan, ViewPlan, final
from polysense.base.telling import Rewrites, ToldFeed
from polysense.towers.clip import body, tiny_pair, vit_pair
from polysense.towers.clip_text import ClipText
from polysense.towers.shapes import heads, plain_vit
from polysense.weights import clip_open_clip, slip_official

card = Card(
    name="LaCLIP", paper="Fan et al., Improving CLIP Training with Language Rewrites, NeurIPS 2023", arxiv="2305.20088", year=2023,
    says="Trains CLIP on captions reworded by a language model, so that it understands more ways of saying things.",
    needs=("image", "text"), can=("encode_image", "encode_text", "encode_patches"), official="LijieFan/LaCLIP",
)

PARAMETERS = 149_619_969                     # ViT-B/16 85.8M, text 63.1M, projections 0.7M; the paper gives the towers only

weights = {"official": slip_official.layout("laclip"), "open_clip": clip_open_clip.layout("laclip", "laion")}


@final
class LaCLIP(DualEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        pass


def tiny() -> Preset:
    """The towers of `clip` tiny. Captions that come without rewrites are reworded by rules, in place of a language model."""
    return Preset(
        data="natural_captions", config=LaCLIP.Config(**tiny_pair()),
        feed=ToldFeed(image=ImagePlan(size=64), text=TextPlan(vocab=4096, length=48), train_image=ViewPlan(size=64, scale=(0.5, 1.0)),
                      told=(Rewrites(voices=("chat", "assistant", "pairs", "human")),)),
        stages=(Stage(objective=LaCLIP.compare, embed=LaCLIP.embed, steps=400, batch_size=128,
                      optim=Optim(lr=1.5e-3, weight_decay=0.5, betas=(0.9, 0.98), warmup=40, clip=1.0)),))


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def paper() -> Preset:
    """ViT-B/16 on CC12M, 35 epochs of batch 8192, one of them warm-up: timm's ViT beside CLIP's text tower, pictures scaled as ImageNet's,
    as SLIP. The data bring the rewrites."""
    epoch = 12_000_000 // 8192
    return Preset(
        data="cc12m", config=LaCLIP.Config(vision=plain_vit(224, 16, 768, 12, 12), **heads(768, 512, 512),
                                           text=ClipText.Config(vocab=49_408, length=77, body=body(512, 12, 8))),
        feed=ToldFeed(image=ImagePlan(size=224, resample="bilinear", mean=MEAN, std=STD), text=TextPlan(vocab=49_408, length=77, pad="zero"),
                      train_image=ViewPlan(size=224, scale=(0.5, 1.0)), told=(Rewrites(),)),
        stages=(Stage(objective=LaCLIP.compare, embed=LaCLIP.embed, steps=35 * epoch, batch_size=8192, checkpoint_activations=True,
                      optim=Optim(lr=1e-3, weight_decay=0.5, betas=(0.9, 0.98), warmup=epoch)),))


def laion() -> Preset:
    """ViT-B/32 on LAION-400M, in CLIP's own form."""
    return paper().but(data="laion400m", config=LaCLIP.Config(**vit_pair(224, 32, body(768, 12, 12), body(512, 12, 8), 512)),
                       **{"feed.image": ImagePlan(size=224)})
