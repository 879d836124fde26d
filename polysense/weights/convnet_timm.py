"""VGG as timm saves it: torchvision's `features`, the dense layers as convolutions `pre_logits.fc1` (7x7) and `fc2` (1x1), then `head.fc`."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.convnet_torchvision import refuse, rows, vision
from polysense.weights.keymap import KeyMap, Op, State, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, size, within
from polysense.weights.vit_timm import timm_feed, to_timm_feed


def window(side: int) -> Op:
    """A convolution [D,C,side,side] is the dense layer [D,C*side*side] over one window."""
    return Op(f"window{side}", lambda t: [t[0].flatten(1)], lambda t: [t[0].unflatten(1, (-1, side, side))])


def keymap(config: Any) -> KeyMap:
    """A Classifier of a plain VGG with two hidden dense layers."""
    c = config.backbone
    dense = (rule(f"pre_logits.fc{i + 1}.{p}", f"backbone.hidden.{i}.{p}", *((window(1 if i else c.grid),) if p == "weight" else ()))
             for i in (0, 1) for p in ("weight", "bias"))
    return KeyMap((*vision(c), *dense, *both("head.fc", "head")))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes."""
    found = rows(state, "vgg")
    one, two, grid = (size(state, "pre_logits.fc1.weight"), size(state, "pre_logits.fc2.weight"), size(state, "pre_logits.fc1.weight", 3))
    if "head.fc.weight" not in state:
        raise UserError("this VGG has no classes", "give a checkpoint with its head")
    published = within(config, "pretrained_cfg")
    return "paper", {"config.backbone.rows": tuple(found), "config.backbone.grid": grid, "config.backbone.hidden": (one, two),
                     "config.backbone.channels": size(state, "features.0.weight", 1), "config.head.into": two,
                     "config.head.out": size(state, "head.fc.weight"), **timm_feed(published, (published.get("input_size") or (3, 224, 224))[1])}


def write(config: Any) -> Dict:
    """`config.json`. Raises UserError for what timm's own arguments do not make."""
    refuse(config, "vgg")
    c, depth = config.backbone, {8: "vgg11", 10: "vgg13", 13: "vgg16", 16: "vgg19"}
    if len(c.rows) not in depth or c.grid != 7 or c.rows[0].out != 64 or c.hidden != (4096, 4096):
        raise UserError("timm's VGG has 8, 10, 13 or 16 convolutions from 64 channels on and dense layers of 4096 over 7 x 7 places",
                        "export to torchvision")
    return {"architecture": depth[len(c.rows)], "num_classes": config.head.out, "num_features": 4096, "global_pool": "avg",
            "pretrained_cfg": {"input_size": [c.channels, 224, 224], "num_classes": config.head.out, "first_conv": "features.0",
                               "classifier": "head.fc", "custom_load": False}}


def feed(of: Feed) -> Dict:
    """What timm says about pictures."""
    out = to_timm_feed(of)
    if of.image is not None:
        out["pretrained_cfg"]["input_size"] = [3, of.image.size, of.image.size]
    return out


LAYOUT = Layout(of="vgg", name="timm", keymap=keymap, read=read, write=write, feed=feed)
