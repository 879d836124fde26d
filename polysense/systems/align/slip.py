"""SLIP: language supervision and self-supervision share one image tower.

Three views of each picture pass the same tower: a lightly cropped one meets its caption (CLIP), two strongly augmented ones meet each
other behind a projector (SimCLR):

    L = L_clip(image, text) + ssl_weight * L_nt_xent(projector(vision(view 1)), projector(vision(view 2)))      (section 3)

The projector reads the feature below CLIP's head and is thrown away after training; at test time SLIP is a CLIP.
"""
from dataclasses import dataclass

from torch import Tensor

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, TextPlan, ViewPlan, final
from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.head import Projector
from polysense.nn.init import ClipInit
from polysense.nn.mlp import MLP
from polysense.nn.transformer import Transformer
from polysense.objectives.contrastive import info_nce, nt_xent
from polysense.towers.clip_text import ClipText
from polysense.towers.shapes import heads, vit_body
from polysense.towers.vit import ViT
from polysense.weights import slip_official

card = Card(
    name="SLIP", paper="Mu et al., SLIP: Self-supervision meets Language-Image Pre-training, ECCV 2022",
    arxiv="2112.12750", year=2022, says="Learns pictures from captions and from themselves at the same time.",
    needs=("image", "text", "views"), can=("encode_image", "encode_text", "encode_patches"), official="facebookresearch/SLIP",
)

PARAMETERS = 170_608_129                     # ViT-B/16 85.8M, text tower 63.1M, heads 0.7M, projector 21.0M; the paper gives no total

weights = {"official": slip_official.LAYOUT}


@final
class SLIP(DualEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        projector: Spec
        ssl_temperature: float = 0.1

    def __init__(self, c: Config):
        super().__init__(c)
        self.projector, self.ssl_temperature = c.projector.build(), c.ssl_temperature

    def embed_views(self, batch: Batch) -> dict[str, Tensor]:
        one, two = (self.projector(self.vision.pooled(v)) for v in batch["views"].unbind(1))
        return {**self.embed(batch), "one": one, "two": two}

    def compare_views(self, seen: dict[str, Tensor]) -> Losses:
        return Losses(clip=info_nce(seen["image"], seen["text"], self.scale), ssl=nt_xent(seen["one"], seen["two"], self.ssl_temperature))


def preset(size: int, patch: int, image: Transformer.Config, text: ClipText.Config, dim: int, projector: tuple[int, ...], data: str,
           stage: Stage, words: TextPlan) -> Preset:
    strong = ViewPlan(size=size, scale=(0.08, 1.0), flip=0.5, jitter=0.8, jitter_by=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=0.5)
    return Preset(
        data=data, stages=(stage,),
        feed=Feed(image=ImagePlan(size=size), train_image=ViewPlan(size=size, scale=(0.5, 1.0)), views=(strong, strong), text=words),
        config=SLIP.Config(vision=ViT.Config(image_size=size, patch=patch, body=image), text=text, projector=Projector.Config(widths=projector),
                           **heads(image.width, text.width, dim)))


def words(width: int, depth: int, heads: int) -> Transformer.Config:
    return Transformer.Config(width=width, depth=depth, heads=heads, init=ClipInit.Config(),
                              block=PreNorm.Config(attn=Attention.Config(), mlp=MLP.Config(act="quick_gelu")))


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tiny() -> Preset:
    text = ClipText.Config(vocab=4096, length=48, end=2, body=words(128, 3, 2))
    return preset(64, 16, vit_body(128, 4, 2), text, 128, (128, 512, 512, 64), "scenes", words=TextPlan(vocab=4096, length=48), stage=Stage(
        objective=SLIP.compare_views, embed=SLIP.embed_views, steps=300, batch_size=128,
        optim=Optim(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), warmup=30, clip=1.0)))


def paper() -> Preset:
    """ViT-B/16 on YFCC15M, 25 epochs of batch 4096 (section 4; 50 and 100 epochs are the longer runs of table 5). Pictures are scaled as ImageNet's:
    so were those that the released weights saw."""
    text, epoch = ClipText.Config(vocab=49408, length=77, body=words(512, 12, 8)), 15_000_000 // 4096
    made = preset(224, 16, vit_body(768, 12, 12), text, 512, (768, 4096, 4096, 256), "yfcc15m", words=TextPlan(vocab=49408, length=77), stage=Stage(
        objective=SLIP.compare_views, embed=SLIP.embed_views, steps=25 * epoch, batch_size=4096,
        optim=Optim(lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), warmup=epoch, final=1e-5 / 3e-3)))
    return made.but(**{"feed.image.mean": MEAN, "feed.image.std": STD, "feed.image.resample": "bilinear"})
