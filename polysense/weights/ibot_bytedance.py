"""iBOT as its authors publish it, without a configuration: `checkpoint_teacher.pth`, the teacher's backbone in timm's names under "state_dict", and
the full checkpoint, with student and teacher, their heads, and both centres.

The full one names the shared last layer twice (`last_layer`, `last_layer2`), and the student's backbone has the mask token.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights import dino_facebook
from polysense.weights.dino_facebook import flat
from polysense.weights.keymap import KeyMap, Op, State, Tensors, both, lead2, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict
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
    """(preset, overrides) from the shapes: those of DINO, and a centre for the patches."""
    preset, out = dino_facebook.read(config, state)
    if preset == "features":
        return preset, out
    if "student.head.last_layer2.weight_v" not in state:
        raise UserError("this checkpoint has no head for patches", "it is one of dino: --system dino")
    return preset, out | {"config.patch_centre.width": out["config.centre.width"]}


def write(config: Any) -> Dict:
    """Nothing but the check that the authors' code could hold this system."""
    if getattr(config.projector, "norm", None) is not None or config.patch_head is not None:
        raise UserError("the authors' released heads are shared and have no norms", "keep the run folder")
    dino_facebook.fits(config, "bytedance", "keep the run folder")
    return {}


LAYOUT = Layout(of="ibot", name="bytedance", keymap=keymap, read=read, write=write, config_file="", weights_file="ibot.pth")
