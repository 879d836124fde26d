"""K-LITE: names come with what a dictionary says of them.

    text  =  a photo of a blick ; blick , a red star with a hole            (name, then its gloss; section 3)

Wiktionary or WordNet is looked up for class names and for the concepts found in captions (`data.knowledge`); training sees texts with and without
knowledge, and is otherwise UniCL: samples of one label are positives of each other, captioned pictures of nobody but themselves. Zero-shot
classes get the same treatment, one row from all templates and glosses. A name never heard in training can so be understood by the words that
define it. With an empty dictionary it is UniCL.
"""
from dataclasses import dataclass

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.card import Card
from polysense.base.system import Feed, ImagePlan, Optim, Preset, Stage, TextPlan, ViewPlan, final
from polysense.towers.shapes import TINY_SWIN, swin_pair
from polysense.towers.swin import Swin
from polysense.weights import unicl_official

card = Card(
    name="K-LITE", paper="Shen et al., K-LITE: Learning Transferable Visual Models with External Knowledge, NeurIPS 2022", arxiv="2204.09222",
    year=2022, says="Understands names it never saw by what a dictionary says about them.",
    needs=("image", "text", "label"), can=("encode_image", "encode_text", "encode_patches"), official="microsoft/klite",
)

PARAMETERS = 91_340_667                      # UniCL's with Swin-T; no total is published

weights = {"official": unicl_official.layout("klite")}


@final
class KLITE(DualEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        pass


def tiny() -> Preset:
    """Drawn scenes; a text may be as long as a caption and a gloss."""
    return Preset(
        data="scenes:combos", config=KLITE.Config(**swin_pair(TINY_SWIN, (128, 3, 2), 128, 4096, 64, 2)),
        feed=Feed(image=ImagePlan(size=64), train_image=ViewPlan(size=64, scale=(0.6, 1.0), flip=0.5), text=TextPlan(vocab=4096, length=64)),
        stages=(Stage(objective=KLITE.compare_labelled, embed=KLITE.embed_labelled, steps=400, batch_size=128,
                      optim=Optim(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), warmup=40, clip=1.0)),))


def paper() -> Preset:
    """Swin-T on ImageNet-21K with Wiktionary and GCC-15M, UniCL's settings."""
    epoch = (13_000_000 + 15_000_000) // 4096
    return Preset(
        data="imagenet21k+gcc15m", config=KLITE.Config(**swin_pair(Swin.Config(drop_path=0.2), (512, 12, 8), 512)),
        feed=Feed(image=ImagePlan(size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
                  train_image=ViewPlan(size=224, scale=(0.08, 1.0), flip=0.5), text=TextPlan(vocab=49_408, length=77, pad="zero")),
        stages=(Stage(objective=KLITE.compare_labelled, embed=KLITE.embed_labelled, steps=32 * epoch, batch_size=4096,
                      optim=Optim(lr=5e-4, weight_decay=0.1, warmup=5 * epoch)),))
