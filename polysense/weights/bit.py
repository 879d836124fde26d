"""BiT, the pre-activated ResNet with group norm: as timm (`resnetv2_50x1_bit`) and as transformers (BitForImageClassification) publish it."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.keymap import KeyMap, Op, Rule, State, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, count, empty_head, hf_feed, size, to_hf_feed, within
from polysense.weights.vit_hf import labels
from polysense.weights.vit_timm import timm_feed, to_timm_feed

places = Op("places", lambda t: [t[0].flatten(1)], lambda t: [t[0][..., None, None]])              # a 1x1 convolution is a dense layer


def _blocks(theirs: str) -> tuple[Rule, ...]:
    ours = "backbone.stages.{s}.{b}"
    return (rule(f"{theirs}.conv{{n}}.weight", f"{ours}.conv{{n}}.weight"), *both(f"{theirs}.norm{{n}}", f"{ours}.norm{{n}}"),
            rule(f"{theirs}.downsample.conv.weight", f"{ours}.shortcut.conv.weight"))


TIMM = KeyMap((rule("stem.conv.weight", "backbone.stem.conv.weight"), *both("norm", "backbone.norm"), *_blocks("stages.{s}.blocks.{b}"),
               rule("head.fc.weight", "head.weight", places), rule("head.fc.bias", "head.bias")))
HF = KeyMap((rule("bit.embedder.convolution.weight", "backbone.stem.conv.weight"), *both("bit.norm", "backbone.norm"),
             *_blocks("bit.encoder.stages.{s}.layers.{b}"), *both("classifier.1", "head")))


def _sizes(state: State, stem: str, stage: str, blocks: str, head: str) -> Dict:
    """Overrides from the shapes: `stage` and `blocks` are where the stages and the blocks of one are counted."""
    base = size(state, f"{stem}.weight")
    layers = tuple(count(state, blocks.format(s=s)) for s in range(count(state, stage)))
    width = base * 2 ** (len(layers) - 1) * 4
    first = f"{blocks.format(s=0)}.0.conv3.weight"
    if size(state, first) != 4 * base:
        raise UserError(f"a first stage of {size(state, first)} channels over a stem of {base}",
                        "only widths that double from four times the stem's are read")
    top: Dict = {"config.head.into": width, "config.head.out": size(state, f"{head}.weight")} if f"{head}.weight" in state \
        else {"config.head": empty_head()}
    return {"config.backbone.layers": layers, "config.backbone.base": base, "config.backbone.channels": size(state, f"{stem}.weight", 1), **top}


def read_timm(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides). The number of groups, 32, is in no file."""
    published = within(config, "pretrained_cfg")
    return "paper", _sizes(state, "stem.conv", "stages", "stages.{s}.blocks", "head.fc") | timm_feed(
        published, (published.get("input_size") or (3, 224, 224))[1])


def read_hf(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides). Raises UserError for another model, other paddings, and the bottleneck form."""
    if config.get("model_type") != "bit" or config.get("layer_type", "preactivation") != "preactivation" or config.get("global_padding") \
            or config.get("embedding_dynamic_padding") or config.get("hidden_act", "relu") != "relu":
        raise UserError("config.json is missing or not of a pre-activated BiT with symmetric padding",
                        "give the folder of a BitForImageClassification")
    plan = within(config, "preprocessor_config")
    pixels = [*within(plan, "crop_size").values(), *within(plan, "size").values(), 224]
    out = _sizes(state, "bit.embedder.convolution", "bit.encoder.stages", "bit.encoder.stages.{s}.layers", "classifier.1")
    return "paper", out | {"config.backbone.block.norm.groups": config.get("num_groups", 32)} | hf_feed(config, int(pixels[0]))


def _published(config: Any) -> Any:
    c = config.backbone
    if not hasattr(c.block.norm, "groups") or not hasattr(c.block.conv, "eps") or c.block.conv.eps != 1e-8 or c.block.norm.eps != 1e-5 \
            or not hasattr(config.head, "out"):
        raise UserError("BiT's files hold a ResNet-v2 with group norm, standardised weights and a dense head", "keep the run folder")
    return c


def write_timm(config: Any) -> Dict:
    """`config.json`. Raises UserError for sizes that timm has no architecture for."""
    c = _published(config)
    known = {((3, 4, 6, 3), 64): "50x1", ((3, 4, 6, 3), 192): "50x3", ((3, 4, 23, 3), 64): "101x1", ((3, 4, 23, 3), 192): "101x3",
             ((3, 8, 36, 3), 128): "152x2", ((3, 8, 36, 3), 256): "152x4"}
    if (c.layers, c.base) not in known or c.block.norm.groups != 32:
        raise UserError(f"timm has no BiT of layers {c.layers} over {c.base} channels", "export to hf")
    return {"architecture": f"resnetv2_{known[c.layers, c.base]}_bit", "num_classes": config.head.out, "num_features": c.width,
            "pretrained_cfg": {"input_size": [c.channels, 224, 224], "num_classes": config.head.out, "first_conv": "stem.conv",
                               "classifier": "head.fc", "custom_load": False}}


def write_hf(config: Any) -> Dict:
    """`config.json` of a BitForImageClassification."""
    c = _published(config)
    return {"architectures": ["BitForImageClassification"], "model_type": "bit", "dtype": "float32", "num_channels": c.channels,
            "embedding_size": c.base, "hidden_sizes": [4 * c.base * 2 ** s for s in range(len(c.layers))], "depths": list(c.layers),
            "layer_type": "preactivation", "hidden_act": "relu", "global_padding": None, "num_groups": c.block.norm.groups,
            "embedding_dynamic_padding": False, "output_stride": 32, "width_factor": 1, "drop_path_rate": 0.0, **labels(config.head.out)}


def feed_timm(of: Feed) -> Dict:
    """What timm says about pictures."""
    out = to_timm_feed(of)
    if of.image is not None:
        out["pretrained_cfg"]["input_size"] = [3, of.image.size, of.image.size]
    return out


def feed_hf(of: Feed) -> Dict:
    """`preprocessor_config.json`."""
    return to_hf_feed(of, "BitImageProcessor")


TIMM_LAYOUT = Layout(of="supervised", name="timm", keymap=lambda config: TIMM, read=read_timm, write=write_timm, feed=feed_timm)
HF_LAYOUT = Layout(of="supervised", name="hf", keymap=lambda config: HF, read=read_hf, write=write_hf, feed=feed_hf,
                   beside=("preprocessor_config.json",))
