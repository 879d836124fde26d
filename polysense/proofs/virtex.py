"""Captions in both directions teach a picture tower more than labels of the same pictures.

Scenes of one large thing are told as "a red star". After equal steps a ridge regression asks the frozen towers for its shape and its colour. VirTex
is compared with the same tower trained on labels (the shape, all that a labeller wrote down) and with one at birth; forward captioning alone stands
beside it. With two things, of different shapes and colours, no tower of captions learned the shapes in the time that a proof has. As filed,
captions teach the colour fully and the shape nearly; labels of the shape teach the shape, and the tower that learned from them keeps enough of the
colour to stay a little ahead in the mean.
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from polysense.base.system import Preset
from polysense.data.loader import Loader
from polysense.data.sources import ListSource, Source
from polysense.nn.head import LinearBias
from polysense.nn.residual import Basic, Stem
from polysense.proofs.arms import train_arm, words
from polysense.proofs.coca import COLOURS, SHAPES, told
from polysense.proofs.harness import Outcome
from polysense.proofs.small import SIZE
from polysense.systems.align import virtex
from polysense.systems.backbone import supervised
from polysense.tasks.few_shot import ridge_scores
from polysense.towers.resnet import ResNet

METRIC, HIGHER_IS_BETTER = "probe accuracy, mean of shape and colour", True
DATA = "scenes of one large thing of four colours and shapes (3,000 told; probed on 1,000, tested on 500 others)"
STEPS, BATCH, VOCAB, LENGTH = 1500, 64, 200, 16
TOWER = ResNet.Config(layers=(1, 1, 1), base=24, stem=Stem.Config(kernel=3, stride=2, pool=0), block=Basic.Config())
ASKED: dict[str, Callable[[str], int]] = {
    "shape": lambda text: SHAPES.index(text.split()[2]), "colour": lambda text: COLOURS.index(text.split()[1])}


def shapes(samples: ListSource) -> ListSource:
    """The same pictures, labelled by shape alone."""
    rows = [r | {"label": ASKED["shape"](r["captions"][0])} for r in samples.samples]
    return ListSource(samples.name, rows, samples.offers, split=samples.split, classes=SHAPES, largest=SIZE)


def sized(preset: Preset, config: Any) -> Preset:
    """A preset with this tower, at the same steps, batch, pictures and optimiser as all."""
    text = {"feed.text.vocab": VOCAB, "feed.text.length": LENGTH} if preset.feed.text else {}
    view = virtex.tiny().feed.train_image
    assert view is not None
    return preset.but(config=config).but(**{**text, "feed.image": virtex.tiny().feed.image, "stages.0.optim": virtex.tiny().stages[0].optim}).but(**{
        "feed.image.size": SIZE, "feed.train_image": view.but(size=SIZE, scale=(0.9, 1.0), flip=0.0, jitter=0.0), "stages.0.steps": STEPS,
        "stages.0.batch_size": BATCH, "stages.0.optim.lr_scale": ()})


def plan(both: bool) -> Preset:
    return sized(virtex.tiny() if both else virtex.tiny_forward(), virtex.config(TOWER, 96, 1, 2, 256, VOCAB, LENGTH, dropout=0.0).but(
        **({} if both else {"backward": None})))


def features(subject: Any, samples: Source) -> torch.Tensor:
    batches = Loader(samples, subject.preset.feed, None, batch_size=250, train=False, needs=("image",))
    with torch.inference_mode():
        return torch.cat([subject.system.encode_image(b["image"]) for b in batches])


def probed(subject: Any, few: Source, test: Source) -> dict[str, float]:
    """Accuracy of each question, from frozen features."""
    learn, asked, out = features(subject, few), features(subject, test), dict[str, float]()
    for name, answer in ASKED.items():
        y, truth = (torch.tensor([answer(s.about(i)["captions"][0]) for i in range(len(s))]) for s in (few, test))
        out[name] = float((torch.from_numpy(ridge_scores(learn, F.one_hot(y, 4), asked)).argmax(1) == truth).float().mean())
    return out


def run(seed: int, test_seed: int = 1001) -> Outcome:
    train, few, test = shapes(told(3000, seed)), told(1000, seed + 500), told(500, test_seed, "test")
    labels = sized(supervised.tiny(), supervised.Supervised.Config(backbone=TOWER, head=LinearBias.Config(into=TOWER.width, out=len(SHAPES))))
    tokenizer, found, mean = words(plan(True), train), {}, {}
    arms = {"virtex": ("virtex", plan(True), ("image", "text")), "forward alone": ("virtex", plan(False), ("image", "text")),
            "labels, same pictures": ("supervised", labels, ("image", "label")), "at birth": ("virtex", plan(True).but(**{"stages": ()}), ())}
    for name, (id_, of, needs) in arms.items():
        subject = train_arm(id_, of, train, needs=needs, seed=seed, tokenizer=tokenizer).subject
        found |= {f"{name}: {k}": v for k, v in probed(subject, few, test).items()}
        mean[name] = sum(found[f"{name}: {k}"] for k in ASKED) / len(ASKED)
    return Outcome(mean.pop("virtex"), {k: mean.pop(k) for k in ("labels, same pictures", "at birth")}, {**mean, **found, "chance": 0.25})
