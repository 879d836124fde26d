"""Deeper plain nets train worse, deeper residual nets do not: the degradation of the paper's figure 1, made and removed.

Four nets, same data, steps and rate: 20 and 44 layers, with and without shortcuts. The number is what depth costs, in training loss.
"""
from polysense.data import source
from polysense.nn.residual import Pad
from polysense.proofs.arms import train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.backbone import resnet

METRIC, HIGHER_IS_BETTER = "training loss of 44 layers minus that of 20, residual nets (plain nets as baseline)", False
DATA = "mnist (30,000 pictures at 28 px, widths 8/16/32, 250 steps of 128)"


def run(seed: int) -> Outcome:
    train, loss = source("mnist"), {}
    for depth in (20, 44):
        for name, shortcut in (("residual", Pad.Config()), ("plain", None)):
            plan = resnet.tiny().but(config=resnet.cifar_form(depth, base=8, shortcut=shortcut)).but(**{"stages.0.steps": 250})
            loss[f"{name}-{depth}"] = train_arm("resnet", plan, train, needs=("image", "label"), seed=seed).final_loss
    return Outcome(loss["residual-44"] - loss["residual-20"], {"plain nets": loss["plain-44"] - loss["plain-20"]}, {
        **loss, "plain degrades": loss["plain-44"] > loss["plain-20"], "residual does not": loss["residual-44"] <= loss["residual-20"]})
