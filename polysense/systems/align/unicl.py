"""UniCL: labels and captions are one kind of supervision.

Every sample is a triplet (picture, text, label). A labelled picture gets its class name in a prompt as text; a captioned one gets a label of its
own that no other sample has (`label` < 0 says so); `Triplets` in the feed does both. With P(i) the samples of the global batch that have the
label of sample i,

    loss = 1/2 [ mean_i -1/|P(i)| sum_(k in P(i)) log softmax_k(s I_i . T_k)   +   the same from texts to pictures ]     (equations 2 to 4)

so pictures and texts of one class attract each other whichever sample they came with. With labels all different this is CLIP; with one text a
class, from pictures to texts alone, it is softmax classification with weights made of texts.
"""
from dataclasses import dataclass

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.archetypes.labelled_pairs import paper_plan, tiny_plan
from polysense.base.card import Card
from polysense.base.system import Preset, final
from polysense.base.telling import Triplets
from polysense.towers.shapes import swin_pair
from polysense.towers.swin import Swin
from polysense.weights import unicl_official

card = Card(
    name="UniCL", paper="Yang et al., Unified Contrastive Learning in Image-Text-Label Space, CVPR 2022", arxiv="2204.03610", year=2022,
    says="Learns one space from labelled and from captioned pictures together, with one loss.",
    needs=("image", "text", "label"), can=("encode_image", "encode_text", "encode_patches"), official="microsoft/UniCL",
)

PARAMETERS = 91_340_667                      # Swin-T 27.5M, text 63.2M (CLIP's, 12x512), projections 0.7M; no total is published

weights = {"official": unicl_official.LAYOUT}


@final
class UniCL(DualEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        pass


def tiny() -> Preset:
    """Small photographs of forty kinds, called by their names in prompts, and captioned photographs."""
    return tiny_plan(UniCL, "tiny_imagenet40+natural_captions", (Triplets(),), length=48)


def paper() -> Preset:
    """Swin-T on ImageNet-21K and YFCC-14M."""
    return paper_plan(UniCL, "imagenet21k+yfcc14m", (Triplets(),), samples=28_000_000)


def swin_base() -> Preset:
    tower = Swin.Config(base=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), drop_path=0.2)
    return paper().but(config=UniCL.Config(**swin_pair(tower, (512, 12, 8), 512)))
