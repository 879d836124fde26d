"""iBOT as its authors publish it, without a configuration: `checkpoint_teacher.pth`, the teacher's backbone in timm's names under "state_dict", and
the full checkpoint, with student and teacher, their heads, and both centres.

The full one names the shared last layer twice (`last_layer`, `last_layer2`), and the student's backbone has the mask token.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights import dino_facebook
from polysense.weights.dino_facebook import HEAD_WIDTH, flat
from polysense.weights.dino_hf import plain
from polysense.weights.keymap import KeyMap, Op, State, Tensors, both, lead2, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body, body_of, count, side, size
from polysense.weights.vit_timm import VISION


def _shared(t: Tensors) -> Tensors:
    if not (t[0].equal(t[2]) and t[1].equal(t[3])):
        raise ValueError("its head is not shared by the class token and the patches, as this system's is")
    return dino_facebook.gain.load(t[:2])


twice = Op("twice", _shared, lambda t: dino_facebook.gain.save(t) * 2)
token = Op("token", lambda t: [t[0][None]], lambda t: [t[0][0]])                  # [1,D] -> [1,1,D]
centre = Op("centre", lead2.save, lead2.load)                                     # [1,1,K] -> [K]


def head(depth: int) -> KeyMap:
    layers = tuple(r for i in range(depth) for r in both(f"head.mlp.{2 * i}", f"projector.layers.{i}"))
    last = tuple(f"head.{name}.{p}" for name in ("last_layer", "last_layer2") for p in ("weight_g", "weight_v"))
    return KeyMap((*layers, rule(last, "projector.last", twice)), own=(r"projector\.gate",))


def keymap(config: Any) -> KeyMap:
    if config.teacher is None or not hasattr(config.projector, "bottleneck"):
        at = "teacher.module.backbone" if config.teacher is not None else "backbone"
        own = (r"heat", r"hide\..*", r"(projector|centre|patch_centre)\..*", *((r"(backbone|teacher\.module\.projector)\..*",)
                                                                                if config.teacher is not None else ()))
        return VISION.at("", at) + KeyMap((), drop=(r"masked_embed", r"head\..*"), own=own)
    whole = VISION.at("backbone", "backbone") + head(config.projector.depth)
    return whole.at("student", "") + whole.at("teacher", "teacher.module") + KeyMap((
        rule("student.backbone.masked_embed", "hide.token", token), rule("ibot_loss.center", "centre.value", flat),
        rule("ibot_loss.center2", "patch_centre.value", centre)), own=("heat",))


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
    if f"{at}.last_layer2.weight_v" not in state:
        raise UserError("this checkpoint has no head for patches", "it is one of dino: --system dino")
    prototypes = size(state, f"{at}.last_layer.weight_v")
    return "paper", out | {"config.projector.into": width, "config.projector.hidden": size(state, f"{at}.mlp.0.weight"),
                           "config.projector.bottleneck": size(state, f"{at}.last_layer.weight_v", 1), "config.projector.depth": depth,
                           "config.projector.out": prototypes, "config.centre.width": prototypes, "config.patch_centre.width": prototypes}


def write(config: Any) -> Dict:
    """Nothing but the check that the authors' code could hold this system."""
    plain(config)
    if getattr(config.projector, "norm", None) is not None or config.patch_head is not None:
        raise UserError("the authors' released heads are shared and have no norms", "keep the run folder")
    of = body_of(config.backbone.body, "bytedance")
    if of["act"] != "gelu" or of["eps"] != 1e-6 or of["heads"] != max(1, of["width"] // HEAD_WIDTH):
        raise UserError("the authors' ViT has GELU, eps 1e-6 and heads of 64 numbers", "keep the run folder")
    return {}


LAYOUT = Layout(of="ibot", name="bytedance", keymap=keymap, read=read, write=write, config_file="", weights_file="ibot.pth")
