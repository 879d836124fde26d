"""UniCL: labels and captions are one kind of supervision.

Every sample is a triplet (picture, text, label). A labelled picture gets its class name in a prompt as text; a captioned one gets a label of its
own that no other sample has (`label` < 0 says so). With P(i) the samples of the global batch that have the label of sample i,

    loss = 1/2 [ mean_i -1/|P(i)| sum_(k in P(i)) log softmax_k(s I_i . T_k)   +   the same from texts to pictures ]     (equations 2 to 4)

so pictures and texts of one class attract each other whichever sample they came with. With labels all different this is CLIP; with one text a
class, from pictures to texts alone, it is softmax classification with weights made of texts.
"""
from dataclasses import dataclass

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.card import Card
from polysense.base.system import Feed, ImagePlan, Optim, Preset, Stage, TextPlan, ViewPlan, final
from polysense.towers.shapes import TINY_SWIN, swin_pair
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
    """Labels are the shapes of drawn scenes; captions say more."""
    return Preset(
        data="scenes:single", config=UniCL.Config(**swin_pair(TINY_SWIN, (128, 3, 2), 128, 4096, 48, 2)),
        feed=Feed(image=ImagePlan(size=64), train_image=ViewPlan(size=64, scale=(0.6, 1.0), flip=0.5), text=TextPlan(vocab=4096, length=48)),
        stages=(Stage(objective=UniCL.compare_labelled, embed=UniCL.embed_labelled, steps=400, batch_size=128,
                      optim=Optim(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), warmup=40, clip=1.0)),))


def paper() -> Preset:
    """Swin-T on ImageNet-21K and YFCC-14M, 32 epochs of batch 4096, 5 of them warm-up."""
    epoch = 28_000_000 // 4096
    return Preset(
        data="imagenet21k+yfcc14m", config=UniCL.Config(**swin_pair(Swin.Config(drop_path=0.2), (512, 12, 8), 512)),
        feed=Feed(image=ImagePlan(size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
                  train_image=ViewPlan(size=224, scale=(0.08, 1.0), flip=0.5), text=TextPlan(vocab=49_408, length=77, pad="zero")),
        stages=(Stage(objective=UniCL.compare_labelled, embed=UniCL.embed_labelled, steps=32 * epoch, batch_size=4096,
                      optim=Optim(lr=5e-4, weight_decay=0.1, warmup=5 * epoch)),))


def swin_base() -> Preset:
    tower = Swin.Config(base=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), drop_path=0.2)
    return paper().but(config=UniCL.Config(**swin_pair(tower, (512, 12, 8), 512)))
