"""NFNet of DeepMind as timm saves it (`dm_nfnet_f0` to `f6`): gains as [C,1,1,1], squeeze-excite as 1x1 convolutions."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.keymap import KeyMap, Op, Rule, State, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, count, size, within
from polysense.weights.vit_timm import timm_feed, to_timm_feed

places = Op("places", lambda t: [t[0].flatten(1)], lambda t: [t[0][..., None, None]])                  # a 1x1 convolution is a dense layer
column = Op("column", lambda t: [t[0].flatten()], lambda t: [t[0].view(-1, 1, 1, 1)])                  # [C,1,1,1] -> [C]


def conv(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (*both(theirs, ours), rule(f"{theirs}.gain", f"{ours}.gain", column))


BLOCK, OURS = "stages.{s}.{b}", "backbone.stages.{s}.{b}"
TABLE = KeyMap((
    *conv("stem.conv{n+1}", "backbone.stem.{n}"), *conv("final_conv", "backbone.final"), *both("head.fc", "head"),
    *conv(f"{BLOCK}.conv1", f"{OURS}.conv1"), *conv(f"{BLOCK}.conv2", f"{OURS}.conv2"), *conv(f"{BLOCK}.conv2b", f"{OURS}.conv3"),
    *conv(f"{BLOCK}.conv3", f"{OURS}.conv4"), *conv(f"{BLOCK}.downsample.conv", f"{OURS}.shortcut"),
    *(rule(f"{BLOCK}.attn_last.fc{n}.weight", f"{OURS}.gate.fc{n}.weight", places) for n in (1, 2)),
    *(rule(f"{BLOCK}.attn_last.fc{n}.bias", f"{OURS}.gate.fc{n}.bias") for n in (1, 2)), rule(f"{BLOCK}.skipinit_gain", f"{OURS}.skip"),
))


def keymap(config: Any) -> KeyMap:
    """A Classifier of an NFNet and a dense head."""
    return TABLE


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes."""
    if "stages.0.0.skipinit_gain" not in state or "stages.0.0.conv2b.weight" not in state:
        raise UserError("this is another normaliser-free network than DeepMind's F series", "those named dm_nfnet are read")
    layers = tuple(count(state, f"stages.{s}") for s in range(count(state, "stages")))
    last, classes = size(state, "final_conv.weight"), size(state, "head.fc.weight")
    widths = tuple(size(state, f"stages.{s}.0.conv3.weight") for s in range(len(layers)))
    out: Dict = {"config.backbone.layers": layers, "config.backbone.widths": widths,
                 "config.backbone.stem": tuple(size(state, f"stem.conv{n + 1}.weight") for n in range(4)), "config.backbone.last": last,
                 "config.backbone.block.group": size(state, "stages.0.0.conv2.weight", 1), "config.head.into": last, "config.head.out": classes,
                 "config.mix.classes": classes}
    published = within(config, "pretrained_cfg")
    side = (published.get("test_input_size") or published.get("input_size") or (3, 256, 256))[1]
    return "f0", out | timm_feed(published, side)


def write(config: Any) -> Dict:
    """`config.json`. Raises UserError for what timm's own arguments do not make."""
    c = config.backbone
    k = c.layers[0]
    if c.widths != (256, 512, 1536, 1536) or c.layers != (k, 2 * k, 6 * k, 3 * k) or c.stem != (16, 32, 64, 128) or not 1 <= k <= 7 \
            or c.stem_strides != (2, 1, 1, 2) or c.block.group != 128 or c.last != 3072:
        raise UserError("timm's dm_nfnet are F0 to F6 of the published widths", "keep the run folder")
    return {"architecture": f"dm_nfnet_f{k - 1}", "num_classes": config.head.out, "num_features": c.last, "global_pool": "avg",
            "pretrained_cfg": {"input_size": [c.channels, 256, 256], "num_classes": config.head.out, "first_conv": "stem.conv1",
                               "classifier": "head.fc", "custom_load": False}}


def feed(of: Feed) -> Dict:
    """What timm says about pictures."""
    out = to_timm_feed(of)
    if of.image is not None:
        out["pretrained_cfg"]["test_input_size"] = [3, of.image.size, of.image.size]
    return out


LAYOUT = Layout(of="nfnet", name="timm", keymap=keymap, read=read, write=write, feed=feed)
