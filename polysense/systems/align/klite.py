"""K-LITE: names come with what a dictionary says of them.

    text  =  a photo of a blick ; blick , a red star with a hole            (name, then its gloss; section 3)

Wiktionary or WordNet is looked up for class names and for the concepts found in captions (`data.knowledge`); training sees texts with and without
knowledge (`Glosses` in the feed), and is otherwise UniCL: samples of one label are positives of each other, captioned pictures of nobody but
themselves. Zero-shot classes and queries get the same treatment; a class is one row, from all templates. A name never heard in training can so be
understood by the words that define it. With an empty dictionary it is UniCL.
"""
from dataclasses import dataclass

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.archetypes.labelled_pairs import paper_plan, tiny_plan
from polysense.base.card import Card
from polysense.base.system import Preset, final
from polysense.base.telling import Glosses, Triplets
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
    """Drawn scenes, whose shapes and colours a built-in dictionary explains; a text may be as long as a caption and a gloss."""
    return tiny_plan(KLITE, "scenes:combos?n=6000", (Triplets(), Glosses(dictionary="scenes")), length=64)


def paper() -> Preset:
    """Swin-T on ImageNet-21K and GCC-15M with Wiktionary, UniCL's settings."""
    return paper_plan(KLITE, "imagenet21k+gcc15m", (Triplets(), Glosses(dictionary="wiktionary")), samples=13_000_000 + 15_000_000)
