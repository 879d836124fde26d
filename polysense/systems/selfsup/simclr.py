"""SimCLR: two random views of a picture should be more alike than any two views of different pictures of the batch.

    h = f(x),   z = W2 relu(W1 h)                                                                                   (section 2.1)
    l(i, j) = -log exp(cos(z_i, z_j) / tau) / sum over k != i of exp(cos(z_i, z_k) / tau)                           (equation 1)
    L = mean of l over the 2B ordered pairs of a batch of B pictures

The other 2(B - 1) views of the batch are the negatives; under several ranks the batch is that of all ranks, gathered with gradient, and batch norms
take their statistics over it. Gradients flow through both views. h is kept, z is thrown away. Crops and colour jitter belong together: without the
jitter the colours of two crops alone give the picture away. Large batches are trained by LARS, which leaves biases and norms alone. The authors'
code adds the losses of both views up, so that it reports twice the number that is meant here.
"""
from dataclasses import dataclass

from torch import Tensor

from polysense.archetypes.twin_views import TwinViews
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, ViewPlan, final
from polysense.nn.head import Nothing
from polysense.nn.mlp import MLP
from polysense.nn.residual import Basic, Bottleneck, Stem
from polysense.objectives.contrastive import nt_xent
from polysense.towers.resnet import ResNet
from polysense.weights import simclr_torchvision

card = Card(
    name="SimCLR", paper="Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020",
    arxiv="2002.05709", year=2020, says="Learns pictures without labels by telling two views of one from the views of all others.",
    needs=("views",), can=("encode_image",), official="google-research/simclr",
)

PARAMETERS = 27_966_656                      # ResNet-50 without its classifier, 23,508,032, and the head, 4,458,624

weights = {"torchvision": simclr_torchvision.LAYOUT}


@final
class SimCLR(TwinViews):
    @dataclass(frozen=True, kw_only=True)
    class Config(TwinViews.Config):
        temperature: float = 0.1

    def __init__(self, c: Config):
        super().__init__(c)
        self.temperature = c.temperature

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        """views [B,2,3,H,W] -> the projections `one` and `two` [B,D]; with `Stage.chunk` they are made in parts and compared as one batch."""
        one, two = (self.project(v) for v in batch["views"].unbind(1))
        return {"one": one, "two": two}

    def compare(self, seen: dict[str, Tensor]) -> Losses:
        return Losses(contrast=nt_xent(seen["one"], seen["two"], self.temperature)).keeping(**seen)


SimCLR.choices = {"augment": {        # what the views may differ in (section 3)
    "crop_and_colour": lambda p: p,
    "crop": lambda p: p.but(**{"feed.views": tuple(v.but(jitter=0.0, grey=0.0) for v in p.feed.views)}),
    "colour": lambda p: p.but(**{"feed.views": tuple(v.but(scale=(1.0, 1.0), ratio=(1.0, 1.0)) for v in p.feed.views)})}}


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preset(size: int, data: str, view: ViewPlan, backbone: Spec, head: Spec, temperature: float, stage: Stage) -> Preset:
    return Preset(data=data, feed=Feed(image=ImagePlan(size=size, mean=MEAN, std=STD), views=(view, view)), stages=(stage,),
                  config=SimCLR.Config(backbone=backbone, projector=head, temperature=temperature))


def strong(size: int, by: float = 1.0) -> ViewPlan:
    """The views of appendix A, with colour distortion of strength `by`; blur's deviation is for 224 pixels."""
    return ViewPlan(size=size, scale=(0.08, 1.0), flip=0.5, jitter=0.8, jitter_by=(0.8 * by, 0.8 * by, 0.8 * by, 0.2 * by), grey=0.2, blur=0.5)


def tiny() -> Preset:
    """A small residual network; colour distortion of half the strength (the authors' for CIFAR-10, appendix B.9) and no blur, crops of a fifth on."""
    tower = ResNet.Config(layers=(1, 1, 1), base=24, stem=Stem.Config(kernel=3, stride=2, pool=0), block=Basic.Config())
    return preset(
        32, "scenes:single", strong(32, 0.5).but(scale=(0.2, 1.0), blur=0.0), tower, MLP.Config(width=96, hidden=96, out=64, act="relu"), 0.2,
        Stage(objective=SimCLR.compare, embed=SimCLR.embed, steps=600, batch_size=128, optim=Optim(lr=1e-3, weight_decay=1e-4, warmup=30)))


def paper() -> Preset:
    """ResNet-50, 1,000 epochs of batch 4096: LARS with lr 0.3 for each 256 pictures, decay 1e-6, ten epochs of warm-up (section 2.2, figure 9)."""
    epoch = 1_281_167 // 4096
    return preset(
        224, "imagenet1k", strong(224), ResNet.Config(block=Bottleneck.Config()), MLP.Config(width=2048, hidden=2048, out=128, act="relu"), 0.1,
        Stage(objective=SimCLR.compare, embed=SimCLR.embed, steps=1000 * epoch, batch_size=4096,
              optim=Optim(name="lars", lr=0.3 * 4096 / 256, momentum=0.9, weight_decay=1e-6, warmup=10 * epoch)))


def features() -> Preset:
    """The published backbone alone."""
    return paper().but(**{"config.projector": Nothing.Config()})
