"""ImageBind as released: one state dict of `modality_preprocessors`, `_trunks`, `_heads`, `_postprocessors`, no configuration.

Sizes are read off the shapes; heads, factors and norms are those of imagebind_huge, the only released form. The causal mask of the text is a
buffer there and dropped here; written files lack it, as their loader makes it anew.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, State, both, flat, rule, scalar, stack3
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body_of, count, side, size

SENSES = {"audio": "rgbt_stem", "depth": "depth_stem", "thermal": "rgbt_stem", "imu": "imu_stem"}      # modality -> its stem's name
HEAD = {"imu": 3}                                            # place of the linear in `modality_heads`; elsewhere 2

BODY = KeyMap((
    *(rule(f"blocks.{{i}}.attn.in_proj_{p}", tuple(f"blocks.{{i}}.attn.{n}.{p}" for n in "qkv"), stack3) for p in ("weight", "bias")),
    *both("blocks.{i}.attn.out_proj", "blocks.{i}.attn.out"),
    *(r for n in (1, 2) for r in both(f"blocks.{{i}}.norm_{n}", f"blocks.{{i}}.norm{n}")),
    *both("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.up"), *both("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.down"),
))


def _sense(name: str, stem: str) -> KeyMap:
    front, trunk, head, after = (f"modality_{p}.{name}" for p in ("preprocessors", "trunks", "heads", "postprocessors"))
    at = "pos_embed" if name == "imu" else "pos_embedding_helper.pos_embed"
    own = KeyMap((
        rule(f"{front}.cls_token", "tower.cls"), rule(f"{front}.{at}", "tower.position"),
        rule(f"{front}.{stem}.proj.weight", "tower.patch.weight"), *both(f"{front}.{stem}.norm_layer", "tower.patch.norm"),
        *(rule(f"{trunk}.blocks.{{i}}.attn.bias_{n}", f"tower.body.blocks.{{i}}.attn.bias_{n}", flat) for n in "kv"),
        *both(f"{head}.0", "tower.body.norm"), rule(f"{head}.{HEAD.get(name, 2)}.weight", "head.weight"),
        rule(f"{after}.1.log_logit_scale", "log_scale", scalar)))
    return (own + BODY.at(trunk, "tower.body")).at("", name)


def keymap(config: Any) -> KeyMap:
    """The frozen pair and whichever modalities the configuration has."""
    front, trunk, head = "modality_preprocessors", "modality_trunks", "modality_heads"
    pair = KeyMap((
        rule(f"{front}.vision.cls_token", "vision.cls"), rule(f"{front}.vision.pos_embedding_helper.pos_embed", "vision.position"),
        rule(f"{front}.vision.rgbt_stem.proj.1.weight", "vision.patch.weight"),
        *both(f"{trunk}.vision.pre_transformer_layer.0", "vision.norm_pre"), *both(f"{head}.vision.0", "vision.body.norm"),
        rule(f"{head}.vision.2.weight", "image_head.weight"),
        rule(f"{front}.text.token_embedding.weight", "text.embed.weight"), rule(f"{front}.text.pos_embed", "text.position"),
        *both(f"{head}.text.proj.0", "text.body.norm"), rule(f"{head}.text.proj.1.weight", "text_head.weight"),
        rule("modality_postprocessors.text.1.log_logit_scale", "log_scale", scalar),
    ), drop=(r"modality_preprocessors\.text\.mask",))
    out = pair + BODY.at(f"{trunk}.vision", "vision.body") + BODY.at(f"{trunk}.text", "text.body")
    for name, stem in SENSES.items():
        if getattr(config, name) is not None:
            out += _sense(name, stem)
    return out


def _body(state: State, name: str, at: str) -> Dict:
    trunk = f"modality_trunks.{name}"
    return {f"{at}.width": size(state, f"{trunk}.blocks.0.norm_1.weight"), f"{at}.depth": count(state, f"{trunk}.blocks"),
            f"{at}.block.mlp.hidden": size(state, f"{trunk}.blocks.0.mlp.fc1.weight")}


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes. UserError for a file that lacks a modality of imagebind_huge."""
    if lost := [n for n in SENSES if f"modality_trunks.{n}.blocks.0.norm_1.weight" not in state]:
        raise UserError(f"the file has no tower for {', '.join(lost)}", "it is incomplete: fetch imagebind_huge.pth again")
    front = "modality_preprocessors"
    patch, dim = size(state, f"{front}.vision.rgbt_stem.proj.1.weight", 3), size(state, "modality_heads.vision.2.weight")
    image = patch * side(size(state, f"{front}.vision.pos_embedding_helper.pos_embed", 1))
    vocab, length = size(state, f"{front}.text.token_embedding.weight"), size(state, f"{front}.text.pos_embed", 1)
    out: Dict = _body(state, "vision", "config.vision.body") | _body(state, "text", "config.text.body") | {
        "config.vision.tokens.size": image, "config.vision.tokens.patch": patch, "feed.image.size": image,
        "config.text.vocab": vocab, "config.text.length": length, "feed.text.vocab": vocab, "feed.text.length": length,
        "config.image_head.into": size(state, "modality_heads.vision.2.weight", 1), "config.image_head.out": dim,
        "config.text_head.into": size(state, "modality_heads.text.proj.1.weight", 1), "config.text_head.out": dim}
    for name in SENSES:
        at = f"config.{name}"
        out |= _body(state, name, f"{at}.tower.body") | {
            f"{at}.head.into": size(state, f"modality_heads.{name}.{HEAD.get(name, 2)}.weight", 1), f"{at}.head.out": dim}
    for name in ("depth", "thermal"):
        kernel = size(state, f"{front}.{name}.{SENSES[name]}.proj.weight", 3)
        plane = kernel * side(size(state, f"{front}.{name}.pos_embedding_helper.pos_embed", 1))
        out |= {f"config.{name}.tower.tokens.size": (plane, plane), f"config.{name}.tower.tokens.kernel": kernel,
                f"config.{name}.tower.tokens.stride": kernel}
    return "paper", out


def write(config: Any) -> Dict:
    """Nothing: the shapes say all. UserError for a system of which that would not be true."""
    if lost := [n for n in SENSES if getattr(config, n) is None]:
        raise UserError(f"this system binds no {', '.join(lost)}, imagebind_huge all", "keep the run folder")
    for part in (config.vision, config.text):
        body_of(part.body, "official")
    heads = {n: getattr(config, n).tower.body.heads for n in SENSES}
    if heads != {"audio": 12, "depth": 8, "thermal": 12, "imu": 8} or {config.vision.body.heads, config.text.body.heads} != {16}:
        raise UserError(f"the layout means imagebind_huge's heads, not {heads}", "keep the run folder")
    return {}


LAYOUT = Layout(of="imagebind", name="official", keymap=keymap, read=read, write=write, config_file="", weights_file="imagebind_huge.pth")
