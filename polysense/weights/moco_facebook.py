"""MoCo as its authors publish it: training checkpoints, a state under "state_dict" without a configuration.

v1 and v2: `encoder_q.*`, and where the file is a whole checkpoint `encoder_k.*`, `queue` [D,K] and `queue_ptr` [1]; the encoder is torchvision's
ResNet with the head under `fc`. v3: `base_encoder.*`, `momentum_encoder.*`, `predictor.*`; the encoder is torchvision's ResNet or timm's ViT.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.weights import resnet_timm, vit_timm
from polysense.weights.keymap import KeyMap, Op, State, batch_norm, both, rule, transpose
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body, count, side, size

COPY, HEADS = "teacher.module", 12           # ViT-S and ViT-B have twelve heads in MoCo v3

pointer = Op("pointer", lambda t: [t[0].reshape(())], lambda t: [t[0].reshape(1)])


def perceptron(theirs: str, ours: str, depth: int, last: str) -> KeyMap:
    """A Sequential of linear, batch norm, ReLU, ..., as our Projector."""
    rules = [rule(f"{theirs}.{3 * i}.weight", f"{ours}.layers.{i}.linear.weight") for i in range(depth)]
    for i in range(depth if last == "norm" else depth - 1):
        rules += batch_norm(f"{theirs}.{3 * i + 1}", f"{ours}.layers.{i}.norm")
    return KeyMap(tuple(rules))


def keymap(config: Any) -> KeyMap:
    resnet = hasattr(config.backbone, "layers")
    vision = resnet_timm.VISION if resnet else vit_timm.VISION
    if config.predictor is not None:
        head = perceptron("fc" if resnet else "head", "projector", len(config.projector.widths) - 1, config.projector.last)
        query, key, extra = "base_encoder", "momentum_encoder", perceptron("", "predictor", 2, config.predictor.last)
        extra = KeyMap(tuple(type(r)(tuple(f"predictor{n}" for n in r.theirs), r.ours, r.op) for r in extra.rules))
    else:
        linear = hasattr(config.projector, "std")
        head = KeyMap(both("fc", "projector") if linear else (*both("fc.0", "projector.up"), *both("fc.2", "projector.down")))
        query, key = "encoder_q", "encoder_k"
        extra = KeyMap((rule("queue", "queue.keys", transpose), rule("queue_ptr", "queue.pointer", pointer)) if config.queue is not None else ())
    whole = (vision.at("", "backbone") + head).at(query)
    copy = (vision.at("", "backbone") + head).at(key, COPY) if config.teacher is not None else KeyMap((), drop=(rf"{key}\..*",))
    return whole + copy + extra


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes. A file without its key encoder gives a system for its features alone."""
    newer = "base_encoder" if any(k.startswith("base_encoder.") for k in state) else ""
    at = newer or "encoder_q"
    inner = {k[len(at) + 1:]: v for k, v in state.items() if k.startswith(at + ".")}
    key = "momentum_encoder" if newer else "encoder_k"
    alone: Dict = {} if any(k.startswith(key) for k in state) else {"config.teacher": None, "config.queue": None}
    if "patch_embed.proj.weight" in inner:
        width, patch = size(inner, "patch_embed.proj.weight"), size(inner, "patch_embed.proj.weight", 3)
        image = patch * side(size(inner, "pos_embed", 1))
        return "v3", alone | {
            "config.backbone.image_size": image, "config.backbone.patch": patch, "feed.image.size": image,
            **body("config.backbone.body", width=width, depth=count(inner, "blocks"), heads=HEADS, hidden=size(inner, "blocks.0.mlp.fc1.weight")),
            "config.projector.widths": widths(inner, "head", (0, 3, 6)), "config.predictor.widths": widths(state, "predictor", (0, 3))}
    if "layer1.0.conv3.weight" not in inner:
        raise UserError("this encoder is neither a ResNet of bottlenecks nor a ViT", "MoCo publishes ResNet-50, ViT-S and ViT-B")
    layers = tuple(count(inner, f"layer{s}") for s in (1, 2, 3, 4))
    tower: Dict = {"config.backbone.base": size(inner, "conv1.weight"), "config.backbone.layers": layers}
    if newer:
        return "v3_resnet", alone | tower | {"config.projector.widths": widths(inner, "fc", (0, 3)),
                                             "config.predictor.widths": widths(state, "predictor", (0, 3))}
    if "queue" in state and not alone:
        tower |= {"config.queue.size": size(state, "queue", 1), "config.queue.width": size(state, "queue")}
    if "fc.weight" in inner:
        return "v1", alone | tower | {"config.projector.into": size(inner, "fc.weight", 1), "config.projector.out": size(inner, "fc.weight")}
    head = {"is": "polysense.nn.mlp:MLP.Config", "width": size(inner, "fc.0.weight", 1), "hidden": size(inner, "fc.0.weight"),
            "out": size(inner, "fc.2.weight"), "act": "relu"}
    return "paper", alone | tower | {"config.projector": from_dict(head)}


def widths(state: State, at: str, layers: tuple[int, ...]) -> tuple[int, ...]:
    return (size(state, f"{at}.0.weight", 1), *(size(state, f"{at}.{i}.weight") for i in layers))


def write(config: Any) -> Dict:
    """Nothing but the check that the authors' code could hold this system."""
    c = config.backbone
    resnet = hasattr(c, "layers")
    if (resnet and (not hasattr(c.block, "stride_in") or c.block.stride_in != "3x3" or len(c.layers) != 4)) \
            or (not resnet and (c.body.heads != HEADS or c.position != "sincos" or config.predictor is None)):
        raise UserError("the authors' MoCo cannot hold this backbone", f"it has a ResNet of bottlenecks, or in v3 a ViT of {HEADS} heads")
    return {}


LAYOUT = Layout(of="moco", name="facebook", keymap=keymap, read=read, write=write, config_file="", weights_file="moco.pth.tar")
