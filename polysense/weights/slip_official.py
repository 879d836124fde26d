"""SLIP as Facebook released it, and CLIP in its form (LaCLIP): timm's ViT, CLIP's text tower, two bare projections, SLIP's projector."""
from dataclasses import replace
from typing import Any

import torch

from polysense.base.errors import UserError
from polysense.weights.clip_openai import HEAD, TEXT
from polysense.weights.keymap import KeyMap, Op, State, batch_norm, rule, scalar, transpose
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body, body_of, count, image_feed, side, size
from polysense.weights.vit_timm import VISION

# Their linears have a bias before batch norm, which only shifts what the norm takes away: it is kept in the running mean.
folded = Op("folded", lambda t: [t[1] - t[0]], lambda t: [torch.zeros_like(t[0]), t[0]])
SMALL, HEADS = 384, 12                       # ViT-S has twelve heads (MoCo v3's form), all others heads 64 wide
EPS = 1e-6

PROJECTOR = KeyMap((
    *(rule(f"layer{n}.weight", f"layers.{n - 1}.linear.weight") for n in (1, 2, 3)), rule("layer3.bias", "layers.2.linear.bias"),
    *(rule((f"layer{n}.bias", f"bn{n}.running_mean"), f"layers.{n - 1}.norm.running_mean", folded) for n in (1, 2)),
    *(r for n in (1, 2) for r in batch_norm(f"bn{n}", f"layers.{n - 1}.norm") if not r.theirs[0].endswith("running_mean")),
))


def keymap(config: Any) -> KeyMap:
    out = VISION.at("visual", "vision") + TEXT.at("", "text") + KeyMap((
        rule("image_projection", "image_head.weight", transpose), rule("text_projection", "text_head.weight", transpose),
        rule("logit_scale", "log_scale", scalar)))
    return out + (PROJECTOR.at("image_mlp", "projector") if hasattr(config, "projector") else KeyMap((), drop=(r"image_mlp\..*",)))


def heads_of(width: int) -> int:
    return HEADS if width == SMALL else max(1, width // HEAD)


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes."""
    width, patch = size(state, "visual.patch_embed.proj.weight"), size(state, "visual.patch_embed.proj.weight", 3)
    text = size(state, "ln_final.weight")
    image, dim = patch * side(size(state, "visual.pos_embed", 1)), size(state, "text_projection", 1)
    vocab, length = size(state, "token_embedding.weight"), size(state, "positional_embedding")
    out: Dict = {
        "config.vision.image_size": image, "config.vision.patch": patch, "config.text.vocab": vocab, "config.text.length": length,
        "config.text.end": None, "feed.text.vocab": vocab, "feed.text.length": length, "config.image_head.into": width,
        "config.image_head.out": dim, "config.text_head.into": text, "config.text_head.out": dim, **image_feed(image),
        **body("config.vision.body", width=width, depth=count(state, "visual.blocks"), heads=heads_of(width),
               hidden=size(state, "visual.blocks.0.mlp.fc1.weight")),
        **body("config.text.body", width=text, depth=count(state, "transformer.resblocks"), heads=max(1, text // HEAD),
               hidden=size(state, "transformer.resblocks.0.mlp.c_fc.weight"))}
    if "image_mlp.layer1.weight" in state:
        out["config.projector.widths"] = (width, *(size(state, f"image_mlp.layer{n}.weight") for n in (1, 2, 3)))
    return "paper", out


def write(config: Any) -> Dict:
    """Nothing: the shapes say all. UserError for a system that these files cannot hold."""
    v, t = config.vision, body_of(config.text.body, "official")
    b = body_of(v.body, "official")
    projector = getattr(config, "projector", None)
    if v.prefix != 1 or v.norm_pre is not None or not v.patch_bias or v.pool != "cls" or v.position != "learned" or b["act"] != "gelu" \
            or b["eps"] != EPS or b["heads"] != heads_of(b["width"]):
        raise UserError("these files hold timm's ViT with a class token, this system has another image tower", "keep the run folder")
    if t["act"] != "quick_gelu" or t["eps"] != 1e-5 or t["heads"] != max(1, t["width"] // HEAD) or config.text.end is not None \
            or (projector is not None and len(projector.widths) != 4):
        raise UserError("these files mean QuickGELU in the text tower, heads 64 wide, a text read at its largest id and a projector of three layers",
                        "keep the run folder")
    return {}


LAYOUT = Layout(of="slip", name="official", keymap=keymap, read=read, write=write, config_file="", weights_file="slip.pt")


def layout(of: str) -> Layout:
    """The same for a system of that form without projector; one that a file has is left out."""
    def read_plain(config: Dict, state: State) -> tuple[str, Dict]:
        return read(config, State({k: v for k, v in state.items() if not k.startswith("image_mlp.")}))
    return replace(LAYOUT, of=of, read=read_plain)
