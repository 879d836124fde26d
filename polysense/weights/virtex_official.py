"""VirTex as released: torchvision's ResNet below `visual.cnn`, torch's decoder layers, and what both directions share under the names of each."""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights import resnet_timm
from polysense.weights.keymap import KeyMap, State, both, lead1, rule, same, stack3, ties
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, count, size

HEAD = 64                                                    # width of an attention head in all released models
LAYER = KeyMap((
    *(r for theirs, ours in (("self_attn", "attn"), ("multihead_attn", "cross")) for r in (
        *(rule(f"{theirs}.in_proj_{p}", tuple(f"{ours}.{n}.{p}" for n in "qkv"), stack3) for p in ("weight", "bias")),
        *both(f"{theirs}.out_proj", f"{ours}.out"))),
    *both("linear1", "mlp.up"), *both("linear2", "mlp.down"), *both("norm1", "norm1"), *both("norm2", "norm_cross"), *both("norm3", "norm2")))
LAYERS = KeyMap(tuple(rule(tuple(f"layers.{{i}}.{n}" for n in r.theirs), tuple(f"blocks.{{i}}.{n}" for n in r.ours), r.op) for r in LAYER.rules))
SHARED = (("embedding.positions.weight", "decoder.text.position", lead1), ("embedding.layer_norm.weight", "decoder.text.norm_pre.weight", same),
          ("embedding.layer_norm.bias", "decoder.text.norm_pre.bias", same), ("visual_projection.weight", "project.weight", same),
          ("visual_projection.bias", "project.bias", same), ("output.bias", "decoder.words.bias", same))


def keymap(config: Any) -> KeyMap:
    ways = ("textual",) if config.backward is None else ("textual", "backward_textual")
    shared = KeyMap((
        rule(tuple(f"{w}.{n}" for w in ways for n in ("embedding.words.weight", "output.weight")), "decoder.text.embed.weight", ties(2 * len(ways))),
        *(rule(tuple(f"{w}.{theirs}" for w in ways), ours, op if len(ways) == 1 else ties(2, op)) for theirs, ours, op in SHARED)))
    out = resnet_timm.VISION.at("visual.cnn", "vision") + shared + LAYERS.at("textual.transformer", "decoder.text.body")
    return out if config.backward is None else out + LAYERS.at("backward_textual.transformer", "backward")


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes."""
    deep = "visual.cnn.layer1.0.conv3.weight" in state
    if "textual.embedding.words.weight" not in state or size(state, "visual.cnn.conv1.weight") != 64 or not deep:
        raise UserError("only captioning models on a ResNet of bottlenecks are read", "a picture tower alone opens as --system resnet --layout timm")
    vocab, width = state["textual.embedding.words.weight"].shape
    layers, channels = tuple(count(state, f"visual.cnn.layer{s}") for s in (1, 2, 3, 4)), size(state, "textual.visual_projection.weight", 1)
    body: Dict = {"width": width, "depth": count(state, "textual.transformer.layers"), "heads": max(1, width // HEAD),
                  "block.mlp.hidden": size(state, "textual.transformer.layers.0.linear1.weight")}
    length = size(state, "textual.embedding.positions.weight")
    backward = any(k.startswith("backward_textual.") for k in state)
    out: Dict = {"config.vision.layers": layers, "config.project.into": channels, "config.project.out": width, "config.decoder.text.vocab": vocab,
                 "config.decoder.words.out": vocab,
                 "config.decoder.text.length": length, "feed.text.vocab": vocab, "feed.text.length": length,
                 **{f"config.decoder.text.body.{k}": v for k, v in body.items()}}
    return "paper", out | ({f"config.backward.{k}": v for k, v in body.items()} if backward else {"config.backward": None})


def write(config: Any) -> Dict:
    """Nothing: the shapes say all. UserError for a system that these files cannot hold."""
    v, t = config.vision, config.decoder.text
    block, b = t.body.block, config.backward
    if not hasattr(v.block, "stride_in") or v.block.stride_in != "3x3" or v.base != 64 or v.stem.kernel != 7 or len(v.layers) != 4 \
            or t.kinds or t.body.norm is not None or block.cross is None or t.body.heads != max(1, t.width // HEAD) or b not in (None, t.body):
        raise UserError("these files hold torchvision's ResNet of bottlenecks and post-norm decoders whose heads are 64 wide", "keep the run folder")
    return {}


LAYOUT = Layout(of="virtex", name="official", keymap=keymap, read=read, write=write, config_file="", weights_file="virtex.pth")
