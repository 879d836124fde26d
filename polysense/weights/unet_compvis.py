"""U-Nets as the original latent diffusion files name them (`model.diffusion_model.*`): one running number over blocks of all levels."""
from typing import Any

from polysense.weights.keymap import KeyMap, Rule, both
from polysense.weights.unet_diffusers import attention


def res_block(theirs: str, ours: str) -> tuple[Rule, ...]:
    names = (("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time"), ("out_layers.0", "norm2"), ("out_layers.3", "conv2"),
             ("skip_connection", "shortcut"))
    return tuple(r for t, o in names for r in both(f"{theirs}.{t}", f"{ours}.{o}"))


def half(config: Any) -> KeyMap:
    """The way down and the middle, for a UNetHalf.Config with SpatialTransformers."""
    rules = [*both("input_blocks.0.0", "conv_in"), *both("time_embed.0", "time.up"), *both("time_embed.2", "time.down"),
             *res_block("middle_block.0", "mid.block1"), *attention(config.mid, "middle_block.1", "mid.attn"),
             *res_block(f"middle_block.{1 + (config.mid is not None)}", "mid.block2")]
    n = 0
    for i, level in enumerate(config.levels):
        for j in range(level.depth):
            n += 1
            rules += [*res_block(f"input_blocks.{n}.0", f"down.{i}.blocks.{j}"), *attention(level.attn, f"input_blocks.{n}.1", f"down.{i}.attn.{j}")]
        if i < len(config.levels) - 1:
            n += 1
            rules += both(f"input_blocks.{n}.0.op", f"down.{i}.shrink.conv")
    return KeyMap(tuple(rules))


def keymap(config: Any) -> KeyMap:
    """The whole network, for a UNet.Config."""
    rules: list[Rule] = [*both("out.0", "norm_out"), *both("out.2", "conv_out")]
    n = 0
    for i, level in enumerate(reversed(config.levels)):
        for j in range(level.depth + 1):
            rules += [*res_block(f"output_blocks.{n}.0", f"up.{i}.blocks.{j}"), *attention(level.attn, f"output_blocks.{n}.1", f"up.{i}.attn.{j}")]
            if j == level.depth and i < len(config.levels) - 1:
                rules += both(f"output_blocks.{n}.{1 + (level.attn is not None)}.conv", f"up.{i}.grow.conv")
            n += 1
    return half(config) + KeyMap(tuple(rules))
