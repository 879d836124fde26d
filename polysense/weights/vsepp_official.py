"""VSE++ as its authors published it: `img_enc.*` (torchvision's ResNet under `cnn`, a dense layer) and `txt_enc.*` (words, GRU)."""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights import resnet_timm
from polysense.weights.keymap import KeyMap, State, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, count, size

RNN = KeyMap(tuple(rule(f"{p}_{n}_l0", f"{p}_{n}_l0") for p in ("weight", "bias") for n in ("ih", "hh")))


def keymap(config: Any) -> KeyMap:
    """The temperature is ours alone: a hinge has none."""
    return resnet_timm.VISION.at("img_enc.cnn", "vision") + RNN.at("txt_enc.rnn", "text.rnn") + KeyMap((
        *both("img_enc.fc", "image_head"), rule("txt_enc.embed.weight", "text.embed.weight")),
        alias=(("img_enc.cnn.module.{rest}", "img_enc.cnn.{rest}"),), own=("log_scale",))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes."""
    inner = {k.removeprefix("img_enc.cnn.").removeprefix("module."): v for k, v in state.items() if k.startswith("img_enc.cnn.")}
    if "layer1.0.conv3.weight" not in inner:
        raise UserError("this image tower is no ResNet of bottlenecks", "of the released models those with ResNet-152 are read")
    width, vocab = size(state, "txt_enc.rnn.weight_hh_l0", 1), size(state, "txt_enc.embed.weight")
    layers = tuple(count(inner, f"layer{s}") for s in (1, 2, 3, 4))
    return "paper", {"config.vision.layers": layers, "config.vision.base": size(inner, "conv1.weight"),
                     "config.image_head.into": size(state, "img_enc.fc.weight", 1), "config.image_head.out": width, "config.text.vocab": vocab,
                     "config.text.words": size(state, "txt_enc.embed.weight", 1), "config.text.width": width, "feed.text.vocab": vocab}


def write(config: Any) -> Dict:
    """Nothing: the shapes say all. UserError for towers that these files cannot hold."""
    if len(config.vision.layers) != 4 or not hasattr(config.vision.block, "stride_in") or not hasattr(config.text, "words"):
        raise UserError("these files hold a ResNet of bottlenecks and a GRU", "keep the run folder")
    return {}


LAYOUT = Layout(of="dual_triplet", name="official", keymap=keymap, read=read, write=write, config_file="", weights_file="vsepp.pt")
