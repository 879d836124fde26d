"""UniCL and K-LITE as Microsoft released them: Swin under its authors' names, CLIP's text tower under names of its own, two bare projections."""
from dataclasses import replace
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.clip_openai import BODY
from polysense.weights.keymap import KeyMap, State, both, lead1, rule, scalar, transpose
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body, body_of, count, size
from polysense.weights.swin_timm import OFFICIAL, sizes

EPS = 1e-12                                  # of the text tower's norms; Swin has 1e-5
TEXT = KeyMap((rule("token_embedding.weight", "embed.weight"), rule("positional_embedding", "position", lead1),
               *both("ln_final", "body.norm"))) + BODY.at("", "body")


def keymap(config: Any) -> KeyMap:
    return OFFICIAL.at("image_encoder", "vision") + TEXT.at("text_encoder", "text") + KeyMap((
        rule("image_projection", "image_head.weight", transpose), rule("text_projection", "text_head.weight", transpose),
        rule("logit_scale", "log_scale", scalar)), drop=(r"image_encoder\.head\..*",))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes; heads of the text tower are 64 wide, its activation is QuickGELU."""
    if "image_encoder.layers.0.blocks.0.attn.relative_position_bias_table" not in state:
        raise UserError("this file's image tower is no Swin", "of the releases only those with Swin are read")
    width, vision = size(state, "text_encoder.token_embedding.weight", 1), sizes(state, "image_encoder.")
    words, length = size(state, "text_encoder.token_embedding.weight"), size(state, "text_encoder.positional_embedding")
    dim = size(state, "image_projection", 1)
    return "paper", {
        **{f"config.vision.{k}": v for k, v in vision.items()}, "config.text.vocab": words, "config.text.length": length, "config.text.end": None,
        "feed.text.vocab": words, "feed.text.length": length, "config.image_head.into": size(state, "image_projection"), "config.image_head.out": dim,
        "config.text_head.into": width, "config.text_head.out": dim,
        **body("config.text.body", width=width, depth=count(state, "text_encoder.resblocks"), heads=max(1, width // 64),
               hidden=size(state, "text_encoder.resblocks.0.mlp.c_fc.weight"), act="quick_gelu", eps=EPS)}


def write(config: Any) -> Dict:
    """Nothing: the shapes say all. UserError for a system that these files cannot hold."""
    if not hasattr(config.vision, "window"):
        raise UserError("the released files hold a Swin, this system has another image tower", "keep the run folder")
    of = body_of(config.text.body, "official")
    if of["act"] != "quick_gelu" or of["eps"] != EPS or of["heads"] != max(1, of["width"] // 64) or config.text.end is not None:
        raise UserError(f"these files mean QuickGELU, eps {EPS}, heads 64 wide, and a text read at its largest id", "keep the run folder")
    return {}


LAYOUT = Layout(of="unicl", name="official", keymap=keymap, read=read, write=write, config_file="", weights_file="unicl.pth")


def layout(of: str) -> Layout:
    """The same for another system of that form."""
    return replace(LAYOUT, of=of)
