"""ResNet under torchvision's names, which timm shares: ResNet-18 to -152, stride in the 3x3 of a bottleneck."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.keymap import KeyMap, State, batch_norm, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, count, empty_head, size, within
from polysense.weights.vit_timm import timm_feed, to_timm_feed

VISION = KeyMap((
    rule("conv1.weight", "stem.conv.weight"), *batch_norm("bn1", "stem.norm"),
    rule("layer{s+1}.{b}.conv{n}.weight", "stages.{s}.{b}.conv{n}.weight"), *batch_norm("layer{s+1}.{b}.bn{n}", "stages.{s}.{b}.norm{n}"),
    rule("layer{s+1}.{b}.downsample.0.weight", "stages.{s}.{b}.shortcut.conv.weight"),
    *batch_norm("layer{s+1}.{b}.downsample.1", "stages.{s}.{b}.shortcut.norm"),
))


def keymap(config: Any) -> KeyMap:
    """A Classifier of a ResNet and a dense head, or no head."""
    return VISION.at("", "backbone") + KeyMap(both("fc", "head"))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes: a third convolution in a block makes it a bottleneck. No configuration is needed."""
    base, layers, deep = size(state, "conv1.weight"), tuple(count(state, f"layer{s}") for s in (1, 2, 3, 4)), "layer1.0.conv3.weight" in state
    width = base * 8 * (4 if deep else 1)
    out: Dict = {"config.backbone.layers": layers, "config.backbone.base": base, "config.backbone.stem.kernel": size(state, "conv1.weight", 3)}
    out |= {"config.head.into": width, "config.head.out": state["fc.weight"].shape[0]} if "fc.weight" in state else {"config.head": empty_head()}
    published = within(config, "pretrained_cfg")
    if published:
        out |= timm_feed(published, (published.get("input_size") or (3, 224, 224))[1])
    return "resnet50" if deep else "resnet18", out


def write(config: Any) -> Dict:
    """`config.json`. Raises UserError for a ResNet that timm's own arguments do not make."""
    c = config.backbone
    deep = hasattr(c.block, "stride_in")
    if (deep and c.block.stride_in != "3x3") or c.base != 64 or len(c.layers) != 4 or c.stem.kernel != 7 or c.stem.stride != 2 or not c.stem.pool \
            or not hasattr(c.block.shortcut, "stride_in") or c.block.shortcut.stride_in != "1x1":
        raise UserError("timm's ResNet has a 7x7 stem of 64 channels with a pool, four stages, stride in the 3x3 and projected shortcuts",
                        "export to hf, or keep the run folder")
    classes = getattr(config.head, "out", 0)
    return {"architecture": "resnet50" if deep else "resnet18", "num_classes": classes, "num_features": 2048 if deep else 512, "global_pool": "avg",
            "model_args": {"layers": list(c.layers)},
            "pretrained_cfg": {"input_size": [c.channels, 224, 224], "num_classes": classes, "first_conv": "conv1", "classifier": "fc",
                               "custom_load": False}}


def feed(of: Feed) -> Dict:
    """What timm says about pictures."""
    out = to_timm_feed(of)
    if of.image is not None:
        out["pretrained_cfg"]["input_size"] = [3, of.image.size, of.image.size]
    return out


LAYOUT = Layout(of="resnet", name="timm", keymap=keymap, read=read, write=write, feed=feed)
