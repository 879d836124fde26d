"""ResNet as transformers publishes it: ResNetForImageClassification."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.keymap import KeyMap, State, batch_norm, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, empty_head, hf_feed, size, to_hf_feed, within
from polysense.weights.vit_hf import labels

BLOCK = "encoder.stages.{s}.layers.{b}"
VISION = KeyMap((
    rule("embedder.embedder.convolution.weight", "stem.conv.weight"), *batch_norm("embedder.embedder.normalization", "stem.norm"),
    rule(f"{BLOCK}.layer.{{n}}.convolution.weight", "stages.{s}.{b}.conv{n+1}.weight"),
    *batch_norm(f"{BLOCK}.layer.{{n}}.normalization", "stages.{s}.{b}.norm{n+1}"),
    rule(f"{BLOCK}.shortcut.convolution.weight", "stages.{s}.{b}.shortcut.conv.weight"),
    *batch_norm(f"{BLOCK}.shortcut.normalization", "stages.{s}.{b}.shortcut.norm"),
))


def keymap(config: Any) -> KeyMap:
    """A Classifier of a ResNet: with a dense head (the tower below `resnet.`), or the bare tower."""
    if not hasattr(config.head, "out"):
        return VISION.at("", "backbone")
    return VISION.at("resnet", "backbone") + KeyMap(both("classifier.1", "head"))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from `config.json`. Raises UserError for widths that no ResNet of the paper has."""
    if config.get("model_type") != "resnet":
        raise UserError("config.json is missing" if not config else f"config.json is of model_type {config.get('model_type')!r}, not 'resnet'",
                        "give the folder of a ResNetForImageClassification")
    depths: list[int] = config.get("depths", [3, 4, 6, 3])
    widths: list[int] = config.get("hidden_sizes", [256, 512, 1024, 2048])
    deep, base = config.get("layer_type", "bottleneck") == "bottleneck", config.get("embedding_size", 64)
    if widths != [base * 2 ** s * (4 if deep else 1) for s in range(len(widths))] or config.get("downsample_in_first_stage") \
            or config.get("hidden_act", "relu") != "relu":
        raise UserError(f"this ResNet has widths {widths} over a stem of {base}, or an early stride",
                        "only widths that double from the stem's are read")
    out: Dict = {"config.backbone.layers": tuple(depths), "config.backbone.base": base}
    if deep:
        out["config.backbone.block.stride_in"] = "1x1" if config.get("downsample_in_bottleneck") else "3x3"
    out |= {"config.head.into": widths[-1], "config.head.out": size(state, "classifier.1.weight")} if "classifier.1.weight" in state \
        else {"config.head": empty_head()}
    plan = within(config, "preprocessor_config")
    pixels = [*within(plan, "crop_size").values(), *within(plan, "size").values(), 224]
    return "resnet50" if deep else "resnet18", out | hf_feed(config, int(pixels[0]))


def write(config: Any) -> Dict:
    """`config.json` of a ResNetForImageClassification (dense head) or a ResNetModel."""
    c = config.backbone
    deep = hasattr(c.block, "stride_in")
    if (deep and c.block.stride_in not in ("1x1", "3x3")) or c.stem.kernel != 7 or c.stem.stride != 2 or not c.stem.pool \
            or not hasattr(c.block.shortcut, "stride_in") or c.block.shortcut.stride_in != "1x1":
        raise UserError("transformers' ResNet has a 7x7 stem with a pool and projected shortcuts", "keep the run folder")
    classes, widths = getattr(config.head, "out", 0), [c.base * 2 ** s * (4 if deep else 1) for s in range(len(c.layers))]
    return {"architectures": ["ResNetForImageClassification" if classes else "ResNetModel"], "model_type": "resnet", "dtype": "float32",
            "num_channels": c.channels, "embedding_size": c.base, "hidden_sizes": widths,
            "depths": list(c.layers), "layer_type": "bottleneck" if deep else "basic", "hidden_act": "relu", "downsample_in_first_stage": False,
            "downsample_in_bottleneck": deep and c.block.stride_in == "1x1", **(labels(classes) if classes else {})}


def feed(of: Feed) -> Dict:
    """`preprocessor_config.json`."""
    return to_hf_feed(of, "ViTImageProcessor")


LAYOUT = Layout(of="resnet", name="hf", keymap=keymap, read=read, write=write, feed=feed, beside=("preprocessor_config.json",))
