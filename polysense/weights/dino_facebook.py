"""DINO as its authors publish it, without a configuration: `dino_*_pretrain.pth`, the teacher's backbone in timm's names, and
`dino_*_full_checkpoint.pth`, with student and teacher, their heads, and the centre.

In a full checkpoint the states stand side by side ("student", "teacher", "dino_loss"); here their keys begin with that name,
and a file is written so.
"""
from typing import Any

import torch

from polysense.base.errors import UserError
from polysense.weights.dino_hf import backbone, plain
from polysense.weights.keymap import KeyMap, Op, State, Tensors, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body, body_of, count, side, size
from polysense.weights.vit_timm import VISION

HEAD_WIDTH = 64                              # numbers of an attention head, in all of them


def _rows(pair: Tensors) -> Tensors:
    if not bool((pair[0] == 1).all()):
        raise ValueError("its rows have a gain other than one, which this head has not")
    return [pair[1]]


gain = Op("gain", _rows, lambda t: [torch.ones_like(t[0][:, :1]), t[0]])          # weight_g and weight_v of weight normalisation
flat = Op("flat", lambda t: [t[0][0]], lambda t: [t[0][None]])                    # [1,K] -> [K]


def head(depth: int) -> KeyMap:
    layers = tuple(r for i in range(depth) for r in both(f"head.mlp.{2 * i}", f"projector.layers.{i}"))
    return KeyMap((*layers, rule(("head.last_layer.weight_g", "head.last_layer.weight_v"), "projector.last", gain)), own=(r"projector\.gate",))


def keymap(config: Any) -> KeyMap:
    if config.teacher is None or not hasattr(config.projector, "bottleneck"):
        return backbone(VISION, config)
    whole = VISION.at("backbone", "backbone") + head(config.projector.depth)
    return whole.at("student", "") + whole.at("teacher", "teacher.module") + KeyMap((rule("dino_loss.center", "centre.value", flat),), own=("heat",))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes."""
    full = "student.backbone.cls_token" in state
    inner = {k.removeprefix("student.backbone."): v for k, v in state.items() if k.startswith("student.backbone.")} if full else state
    width, patch = size(inner, "patch_embed.proj.weight"), size(inner, "patch_embed.proj.weight", 3)
    image = patch * side(size(inner, "pos_embed", 1))
    out: Dict = {"config.backbone.image_size": image, "config.backbone.patch": patch, "feed.image.size": image,
                 **body("config.backbone.body", width=width, depth=count(inner, "blocks"), heads=max(1, width // HEAD_WIDTH),
                        hidden=size(inner, "blocks.0.mlp.fc1.weight"))}
    if not full:
        return "features", out
    at, depth = "student.head", sum(k.startswith("student.head.mlp.") and k.endswith(".weight") for k in state)
    prototypes = size(state, f"{at}.last_layer.weight_v")
    return "paper", out | {"config.projector.into": width, "config.projector.hidden": size(state, f"{at}.mlp.0.weight"),
                           "config.projector.bottleneck": size(state, f"{at}.last_layer.weight_v", 1), "config.projector.depth": depth,
                           "config.projector.out": prototypes, "config.centre.width": prototypes}


def fits(config: Any, package: str, instead: str) -> None:
    """Raises a UserError where the authors' code could not hold this tower."""
    plain(config)
    of = body_of(config.backbone.body, package)
    if of["act"] != "gelu" or of["eps"] != 1e-6 or of["heads"] != max(1, of["width"] // HEAD_WIDTH):
        raise UserError("the authors' ViT has GELU, eps 1e-6 and heads of 64 numbers", instead)


def write(config: Any) -> Dict:
    """Nothing but the check that the authors' code could hold this system."""
    if getattr(config.projector, "norm", None) is not None:
        raise UserError("the authors' released heads have no norms", "export to hf, which holds the backbone")
    fits(config, "facebook", "export to hf")
    return {}


LAYOUT = Layout(of="dino", name="facebook", keymap=keymap, read=read, write=write, config_file="", weights_file="dino.pth")
