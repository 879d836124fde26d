"""The discrete VAE of DALL-E as OpenAI released it, and its encoder as transformers keeps it for FLAVA.

`openai`: the state dictionaries of encoder.pkl and decoder.pkl in one file, below `encoder.` and `decoder.`. The released files are pickled
modules, which would run code when read; write their states once: `{"encoder." + k: v for k, v in encoder.state_dict().items()} | ...`.
`flava`: `FlavaImageCodebook`, encoder only.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, Rule, State, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, image_feed, size

WORDS = {"openai": ("w", "b", "", ""), "flava": ("weight", "bias", ".group", ".path")}


def _half(layout: str, theirs: str, ours: str) -> KeyMap:
    """Encoder or decoder: both have the same names."""
    weight, bias, group, path = WORDS[layout]
    pairs = ((weight, "weight"), (bias, "bias"))
    block, mine = f"blocks.group_{{s+1}}{group}.block_{{b+1}}", "stages.{s}.{b}"
    rules: list[Rule] = []
    for p, q in pairs:
        rules += [rule(f"blocks.input.{p}", f"input.{q}"), rule(f"blocks.output.conv.{p}", f"output.{q}"),
                  rule(f"{block}.id_path.{p}", f"{mine}.shortcut.{q}"), rule(f"{block}.res_path{path}.conv_{{n+1}}.{p}", f"{mine}.convs.{{n}}.{q}")]
    return KeyMap(tuple(rules)).at(theirs, ours)


MOVING = KeyMap((), own=("temperature", "beta"))             # where the schedules of training are; not published


def openai_keymap(config: Any) -> KeyMap:
    return _half("openai", "encoder", "codec.encoder") + _half("openai", "decoder", "codec.decoder") + MOVING


def flava_keymap(config: Any) -> KeyMap:
    table = _half("flava", "", "codec.encoder")
    return KeyMap(table.rules, table.drop, (("image_codebook.{rest}", "{rest}"),)) + MOVING


def _sizes(state: State, at: str, word: str, layout: str) -> tuple[int, int]:
    """(stages, blocks a stage)."""
    group = WORDS[layout][2]
    stages = sum(f"{at}blocks.group_{s}{group}.block_1.res_path{WORDS[layout][3]}.conv_1.{word}" in state for s in range(1, 10))
    depth = sum(f"{at}blocks.group_1{group}.block_{b}.res_path{WORDS[layout][3]}.conv_1.{word}" in state for b in range(1, 100))
    return stages, depth


def read_openai(config: Dict, state: State) -> tuple[str, Dict]:
    groups, depth = _sizes(state, "encoder.", "w", "openai")
    width, codes = size(state, "encoder.blocks.input.w"), size(state, "encoder.blocks.output.conv.w")
    same: Dict = {"codes": codes, "width": width, "groups": groups, "depth": depth}
    return "paper", {**{f"config.codec.{part}.{k}": v for part in ("encoder", "decoder") for k, v in same.items()},
                     "config.codec.decoder.into": size(state, "decoder.blocks.input.w")}


def read_flava(config: Dict, state: State) -> tuple[str, Dict]:
    prefix = "image_codebook." if "image_codebook.blocks.input.weight" in state else ""
    groups, depth = _sizes(state, prefix, "weight", "flava")
    sizes: Dict = {"codes": size(state, f"{prefix}blocks.output.conv.weight"), "width": size(state, f"{prefix}blocks.input.weight"),
                   "groups": groups, "depth": depth}
    return "tokenizer", {f"config.codec.encoder.{k}": v for k, v in sizes.items()} | image_feed(112, resample="bicubic")


def write_openai(config: Any) -> Dict:
    if config.codec.decoder is None:
        raise UserError("OpenAI's release has a decoder, these weights have none", "export to flava")
    return {}


def write_flava(config: Any) -> Dict:
    c = config.codec.encoder
    if config.codec.decoder is not None:
        raise UserError("FLAVA's codebook has no decoder", "export to openai, or from a system of the preset `tokenizer`")
    return {"model_type": "flava_image_codebook", "architectures": ["FlavaImageCodebook"], "num_groups": c.groups, "input_channels": c.channels,
            "num_blocks_per_group": c.depth, "hidden_size": c.width, "vocab_size": c.codes}


OPENAI = Layout(of="dalle_dvae", name="openai", keymap=openai_keymap, read=read_openai, write=write_openai, config_file="")
FLAVA = Layout(of="dalle_dvae", name="flava", keymap=flava_keymap, read=read_flava, write=write_flava)
