"""Two towers and a margin: the loss that contrast over a whole batch replaced.

    sum over anchors of both kinds of   max(0, m + s(anchor, negative) - s(anchor, positive)),     s the cosine        (VSE++, equations 4 to 6)

Written with distances d = 1 - s that is max(0, m + d(a, p) - d(a, n)). Which negatives count is the policy: the sum of all, the hardest of the batch
(VSE++), semi-hard ones (FaceNet), or one at random. Training by the hardest alone may collapse at the start: it begins after a stage with the sum.
Captions of one picture are never each other's negatives. `compare` is InfoNCE on the same towers, so that the two can be told apart fairly.
"""
from dataclasses import dataclass

from torch import Tensor

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Stage, Start, TextPlan, ViewPlan, final
from polysense.nn.head import LinearBias, Nothing
from polysense.nn.residual import Basic, Bottleneck, Stem
from polysense.objectives.triplet import FALLBACKS, POLICIES, hinge
from polysense.towers.gru_text import GruText
from polysense.towers.resnet import ResNet
from polysense.weights import vsepp_official

card = Card(
    name="VSE++ (dual-tower triplet)", paper="Faghri et al., VSE++: Improving Visual-Semantic Embeddings with Hard Negatives, BMVC 2018",
    arxiv="1707.05612", year=2018, says="Matches pictures and texts by a margin over hard negatives: the baseline of contrastive learning.",
    needs=("image|features", "text", "index"), can=("encode_image", "encode_text", "encode_patches"), official="fartashf/vsepp",
)

PARAMETERS = 67_841_957                      # ResNet-152 58.1M, its projection 2.1M, word embeddings of COCO's 11,755 words 3.5M, GRU 4.1M

weights = {"official": vsepp_official.LAYOUT}


@final
class DualTriplet(DualEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        margin: float = 0.2
        policy: str = "hardest"              # of the second stage: sum, hardest, semi_hard or random
        fallback: str = "none"               # of an anchor without a semi-hard negative: it pays nothing, or for the "hardest"

    def __init__(self, c: Config):
        super().__init__(c)
        if c.policy not in POLICIES or c.fallback not in FALLBACKS:
            raise UserError(f"policy={c.policy!r}, fallback={c.fallback!r} chooses no negatives",
                            f"the policy is one of {', '.join(POLICIES)}, the fallback {' or '.join(FALLBACKS)}")
        self.margin, self.policy, self.fallback = c.margin, c.policy, c.fallback

    def embed_owned(self, batch: Batch) -> dict[str, Tensor]:
        """As `embed`, and which picture each sample is of."""
        return {**self.embed(batch), "owner": batch["index"]}

    def warm_up(self, seen: dict[str, Tensor]) -> Losses:
        return Losses(hinge=hinge(seen["image"], seen["text"], self.margin, "sum", seen["owner"]))

    def tell_apart(self, seen: dict[str, Tensor]) -> Losses:
        return Losses(hinge=hinge(seen["image"], seen["text"], self.margin, self.policy, seen["owner"], self.fallback))


TOWERS = ("vision.*", "text.*", "image_head.*")                     # a hinge has no temperature


def config(image: ResNet.Config, vocab: int, length: int, width: int, words: int) -> DualTriplet.Config:
    return DualTriplet.Config(vision=image, text=GruText.Config(vocab=vocab, length=length, width=width, words=words),
                              image_head=LinearBias.Config(into=image.width, out=width), text_head=Nothing.Config())


def stages(warm: int, steps: int, batch: int, optim: Optim, trainable: tuple[str, ...] = TOWERS) -> tuple[Stage, ...]:
    return (Stage(name="warm_up", objective=DualTriplet.warm_up, embed=DualTriplet.embed_owned, trainable=trainable, steps=warm, batch_size=batch,
                  optim=optim.but(warmup=0, schedule="constant")),
            Stage(name="hard", objective=DualTriplet.tell_apart, embed=DualTriplet.embed_owned, trainable=trainable, steps=steps, batch_size=batch,
                  optim=optim))


def tiny() -> Preset:
    tower = ResNet.Config(layers=(1, 1, 1), base=32, stem=Stem.Config(kernel=3, stride=2, pool=0), block=Basic.Config())
    return Preset(
        data="natural_captions", config=config(tower, 4096, 48, 128, 96), stages=stages(150, 250, 128, Optim(lr=1e-3, clip=2.0)),
        feed=Feed(image=ImagePlan(size=64), text=TextPlan(vocab=4096, length=48, kind="wordpiece"),
                  train_image=ViewPlan(size=64, scale=(0.6, 1.0), flip=0.5)))


def paper() -> Preset:
    """ResNet-152 of ImageNet on COCO: 30 epochs of batch 128 with Adam beside the frozen tower, the rate a tenth in the second half; then 15 that
    tune the tower too, at a tenth (section 4.1)."""
    epoch = 113_287 * 5 // 128
    optim = Optim(name="adam", lr=2e-4, schedule="step", milestones=(0.5,), clip=2.0)
    tune = Stage(name="tune", objective=DualTriplet.tell_apart, embed=DualTriplet.embed_owned, trainable=TOWERS, steps=15 * epoch, batch_size=128,
                 optim=Optim(name="adam", lr=2e-5, schedule="constant", clip=2.0))
    return Preset(
        starts=(Start(into="vision", from_="resnet", take="backbone", preset="resnet152"),),
        data="coco_captions", config=config(ResNet.Config(layers=(3, 8, 36, 3), block=Bottleneck.Config()), 11_755, 64, 1024, 300),
        stages=(*stages(epoch, 29 * epoch, 128, optim, ("text.*", "image_head.*")), tune),
        feed=Feed(image=ImagePlan(size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
                  train_image=ViewPlan(size=224, scale=(0.6, 1.0), flip=0.5), text=TextPlan(kind="wordpiece", vocab=11_755, length=64)))
