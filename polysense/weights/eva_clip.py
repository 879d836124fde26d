"""EVA-CLIP: as the authors release it (one state dict, sizes read off the shapes), and as open_clip publishes it (timm's tower inside).

Both rotate neighbouring features of a head, ours the two halves: rows of queries and keys are permuted.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights import clip_open_clip
from polysense.weights.clip_openai import TEXT, text_sizes
from polysense.weights.keymap import KeyMap, Rule, State, both, rule, same, scalar, stack3, transpose
from polysense.weights.layout import Layout
from polysense.weights.llama_hf import unpermute
from polysense.weights.sizes import Dict, body_of, count, image_feed, side, size, within

HEAD = 64                                    # width of the heads of EVA-02-B and -L and of every text tower
HEADS = 16                                   # of EVA-01-g and EVA-02-E
WIDEST = 1792                                # EVA-02-E: what has these names and this width has its norms behind the branches
GRID = 16                                    # of pre-training, to a side, of every release
NAMES = {(768, 16, 12): "eva02_base_patch16_clip_224", (1024, 14, 24): "eva02_large_patch14_clip_224", (1408, 14, 40): "eva_giant_patch14_224",
         (1792, 14, 64): "eva02_enormous_patch14_clip_224"}                 # (width, patch, depth) -> timm's architecture


def turns(config: Any) -> bool:
    """Whether this is EVA-02 with rotations."""
    return config.vision.body.block.attn.rope is not None


def _tower(config: Any, words: dict[str, str]) -> tuple[Rule, ...]:
    """Image tower below their name; `words`: what the two libraries call differently."""
    theirs, ours = "blocks.{i}", "body.blocks.{i}"
    turn = unpermute(config.vision.body.heads) if turns(config) else same
    out = [rule("cls_token", "cls"), rule("pos_embed", "position"), *both("patch_embed.proj", "patch"), *both("norm", "body.norm"),
           *both(f"{theirs}.norm1", f"{ours}.norm1"), *both(f"{theirs}.norm2", f"{ours}.norm2"), *both(f"{theirs}.attn.proj", f"{ours}.attn.out")]
    if not turns(config):
        return (*out, rule(f"{theirs}.attn.qkv.weight", tuple(f"{ours}.attn.{n}.weight" for n in "qkv"), stack3),
                *(rule(f"{theirs}.attn.{n}_bias", f"{ours}.attn.{n}.bias") for n in "qv"),
                *both(f"{theirs}.mlp.fc1", f"{ours}.mlp.up"), *both(f"{theirs}.mlp.fc2", f"{ours}.mlp.down"))
    return (*out, *(rule(f"{theirs}.attn.{n}_proj.weight", f"{ours}.attn.{n}.weight", same if n == "v" else turn) for n in "qkv"),
            *(rule(f"{theirs}.attn.{words['bias'].format(n)}", f"{ours}.attn.{n}.bias", same if n == "v" else turn) for n in "qv"),
            *both(f"{theirs}.attn.{words['attn']}", f"{ours}.attn.norm_inner"),
            *(r for n in ("gate", "up", "down", "mlp") for r in both(f"{theirs}.mlp.{words[n]}", f"{ours}.mlp.{'norm_inner' if n == 'mlp' else n}")))


def _around(tower: tuple[Rule, ...], at: str, drop: tuple[str, ...] = ()) -> KeyMap:
    head = KeyMap((*both(f"{at}.head", "image_head"), rule("text.text_projection", "text_head.weight", transpose),
                   rule("logit_scale", "log_scale", scalar)), drop)
    return KeyMap(tower).at(at, "vision") + head + TEXT.at("text", "text")


def official_keymap(config: Any) -> KeyMap:
    words = {"bias": "{}_bias", "attn": "inner_attn_ln", "gate": "w1", "up": "w2", "down": "w3", "mlp": "ffn_ln"}
    return _around(_tower(config, words), "visual", (r"visual\.(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)",))


def open_clip_keymap(config: Any) -> KeyMap:
    words = {"bias": "{}_proj.bias", "attn": "norm", "gate": "fc1_g", "up": "fc1_x", "down": "fc2", "mlp": "norm"}
    return _around(_tower(config, words), "visual.trunk")


def _sizes(state: State, at: str, rotary: str, up: str) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes of an image tower below `at` and of the text tower."""
    width, patch = size(state, f"{at}.patch_embed.proj.weight"), size(state, f"{at}.patch_embed.proj.weight", 3)
    rope, dim = f"{at}.blocks.0.attn.{rotary}" in state, size(state, f"{at}.head.weight")
    image, words = patch * side(size(state, f"{at}.pos_embed", 1)), size(state, "text.ln_final.weight")
    wide = state[f"{at}.rope.freqs_cos"].shape[-1] if f"{at}.rope.freqs_cos" in state else HEAD
    hidden = size(state, f"{at}.blocks.0.mlp.{up if rope else 'fc1'}.weight")
    out = text_sizes(size(state, "text.token_embedding.weight"), size(state, "text.positional_embedding"), dim, width=words,
                     depth=count(state, "text.transformer.resblocks"), heads=max(1, words // HEAD),
                     hidden=size(state, "text.transformer.resblocks.0.mlp.c_fc.weight"), act="gelu", eps=1e-5)
    body = "config.vision.body"
    out |= {"config.vision.image_size": image, "config.vision.patch": patch, f"{body}.width": width, f"{body}.depth": count(state, f"{at}.blocks"),
            f"{body}.heads": width // wide if rope else HEADS, f"{body}.block.mlp.hidden": hidden,
            "config.image_head.into": width, "config.image_head.out": dim}
    return "paper" if rope else "e_14" if width == WIDEST else "g_14", out


def read_official(config: Dict, state: State) -> tuple[str, Dict]:
    name, out = _sizes(state, "visual", "q_proj.weight", "w1")
    return name, out | image_feed(out["config.vision.image_size"])


def read_open_clip(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes; `open_clip_config.json` says which tower it is and how pictures are read."""
    cfg = within(config, "model_cfg") or (config if "embed_dim" in config else {})
    kind = within(cfg, "vision_cfg").get("timm_model_name") or ""
    if not kind.startswith("eva"):
        raise UserError(f"open_clip_config.json names {kind or 'no'} tower of timm, not one of EVA", "open another system, or put the file beside")
    name, out = _sizes(state, "visual.trunk", "q_proj.weight", "fc1_g")
    name = "e_14" if "enormous" in kind else name
    plan = within(config, "preprocess_cfg")
    return name, out | image_feed(out["config.vision.image_size"], mean=plan.get("mean"), std=plan.get("std"),
                                  resample=plan.get("interpolation", ""), fit="squash" if plan.get("resize_mode") == "squash" else "crop")


def _checked(config: Any, layout: str) -> None:
    """UserError for a system that EVA's code does not compute."""
    v, text = config.vision, body_of(config.text.body, layout)
    attn = v.body.block.attn
    heads = v.body.width // HEAD if turns(config) else HEADS
    if text["act"] != "gelu" or text["eps"] != 1e-5 or text["heads"] != max(1, text["width"] // HEAD) or config.text.end is not None:
        raise UserError(f"the layout {layout!r} means a text tower with GELU, heads {HEAD} wide, read at the largest id", "keep the run folder")
    if v.pool != "cls" or v.prefix != 1 or v.norm_pre is not None or attn.bias != "q v out" or v.body.heads != heads or \
            (turns(config) and attn.rope.grid != GRID):
        raise UserError(f"the layout {layout!r} means EVA's image towers: the class token, heads {HEAD} wide or {HEADS} of them, rotations on a "
                        f"grid of {GRID}", "keep the run folder")


def write_official(config: Any) -> Dict:
    """Nothing: the shapes say all."""
    _checked(config, "official")
    if not turns(config) and (config.vision.body.width == WIDEST) != type(config.vision.body.block).__qualname__.startswith("BranchNorm"):
        raise UserError(f"in this layout a plain tower has its norms behind the branches at a width of {WIDEST} only", "keep the run folder")
    return {}


def write_open_clip(config: Any) -> Dict:
    """`open_clip_config.json`. UserError for a tower that timm does not name."""
    _checked(config, "open_clip")
    v, t = config.vision, body_of(config.text.body, "open_clip")
    name = NAMES.get((v.body.width, v.patch, v.body.depth))
    if name is None or v.image_size not in (224, 336):
        raise UserError("open_clip builds EVA's published towers only", "export to official")
    name = name.replace("224", str(v.image_size))
    return {"model_cfg": {"embed_dim": config.text_head.out, "custom_text": True,
                          "vision_cfg": {"image_size": v.image_size, "timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "token",
                                         "timm_proj": None},
                          "text_cfg": {"context_length": config.text.length, "vocab_size": config.text.vocab, "width": t["width"],
                                       "heads": t["heads"], "layers": t["depth"]}}}


def feed(of: Feed) -> Dict:
    return clip_open_clip.feed(of)


OFFICIAL = Layout(of="eva_clip", name="official", keymap=official_keymap, read=read_official, write=write_official, config_file="",
                  weights_file="eva_clip.pt")
OPEN_CLIP = Layout(of="eva_clip", name="open_clip", keymap=open_clip_keymap, read=read_open_clip, write=write_open_clip, feed=feed,
                   config_file="open_clip_config.json", weights_file="open_clip_model.safetensors")
