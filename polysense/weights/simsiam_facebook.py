"""SimSiam as its authors publish it (`checkpoint_0099.pth.tar`): a training checkpoint, `module.encoder.*` with torchvision's ResNet and the
projector under `fc.0` to `fc.7`, and `module.predictor.0` to `.3`.

Their last linear of the projector has a bias that is never trained, as the norm behind it takes its mean away. Here that layer has none: on reading
it goes into the norm's running mean, which gives the same numbers, and on writing it is zero.
"""
from typing import Any

import torch

from polysense.base.errors import UserError
from polysense.weights import resnet_timm
from polysense.weights.keymap import KeyMap, Op, State, batch_norm, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, count, size

idle = Op("idle", lambda t: [t[1] - t[0]], lambda t: [torch.zeros_like(t[0]), t[0]])       # (bias, running mean behind it) and our running mean


def keymap(config: Any) -> KeyMap:
    head = [rule(f"fc.{3 * i}.weight", f"projector.layers.{i}.linear.weight") for i in range(3)]
    for i in range(2):
        head += batch_norm(f"fc.{3 * i + 1}", f"projector.layers.{i}.norm")
    head += [rule(("fc.6.bias", "fc.7.running_mean"), "projector.layers.2.norm.running_mean", idle),
             *(rule(f"fc.7.{p}", f"projector.layers.2.norm.{p}") for p in ("running_var", "num_batches_tracked"))]
    whole = (resnet_timm.VISION.at("", "backbone") + KeyMap(tuple(head))).at("encoder")
    return whole + KeyMap((rule("predictor.0.weight", "predictor.layers.0.linear.weight"), *batch_norm("predictor.1", "predictor.layers.0.norm"),
                           *both("predictor.3", "predictor.layers.1.linear")))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes."""
    inner = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    if "layer1.0.conv3.weight" not in inner:
        raise UserError("this encoder is no ResNet of bottlenecks", "SimSiam publishes ResNet-50")
    return "paper", {
        "config.backbone.base": size(inner, "conv1.weight"), "config.backbone.layers": tuple(count(inner, f"layer{s}") for s in (1, 2, 3, 4)),
        "config.projector.widths": (size(inner, "fc.0.weight", 1), *(size(inner, f"fc.{i}.weight") for i in (0, 3, 6))),
        "config.predictor.widths": (size(state, "predictor.0.weight", 1), size(state, "predictor.0.weight"), size(state, "predictor.3.weight"))}


def write(config: Any) -> Dict:
    """Nothing but the check that the authors' code could hold this system."""
    c = config.backbone
    if not hasattr(c, "layers") or getattr(c.block, "stride_in", "") != "3x3" or len(c.layers) != 4 or config.predictor is None:
        raise UserError("the authors' SimSiam has a ResNet of four stages of bottlenecks and a predictor", "keep the run folder")
    if len(config.projector.widths) != 4 or config.projector.last != "norm" or len(config.predictor.widths) != 3:
        raise UserError("the authors' SimSiam has a projector of three layers and a predictor of two", "keep the run folder")
    return {}


LAYOUT = Layout(of="simsiam", name="facebook", keymap=keymap, read=read, write=write, config_file="", weights_file="simsiam.pth.tar")
