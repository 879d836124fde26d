"""Swin as timm names it, and as its authors did (their halving stands at the end of a stage)."""
from typing import Any

from polysense.weights.keymap import KeyMap, State, both, rule, stack3
from polysense.weights.sizes import count, size


def blocks(stage: str) -> KeyMap:
    """One block; `stage` is the place holder of its stage in both names."""
    theirs, ours = f"layers.{stage}.blocks.{{i}}", f"stages.{stage}.blocks.{{i}}"
    return KeyMap((
        *(rule(f"{theirs}.attn.qkv.{p}", tuple(f"{ours}.attn.{n}.{p}" for n in "qkv"), stack3) for p in ("weight", "bias")),
        *both(f"{theirs}.attn.proj", f"{ours}.attn.out"), rule(f"{theirs}.attn.relative_position_bias_table", f"{ours}.table"),
        *both(f"{theirs}.norm1", f"{ours}.norm1"), *both(f"{theirs}.norm2", f"{ours}.norm2"),
        *both(f"{theirs}.mlp.fc1", f"{ours}.mlp.up"), *both(f"{theirs}.mlp.fc2", f"{ours}.mlp.down"),
    ), drop=(r"layers\.\d+\.blocks\.\d+\.attn\.relative_position_index", r"layers\.\d+\.blocks\.\d+\.attn_mask"))


STEM = KeyMap((*both("patch_embed.proj", "patch"), *both("patch_embed.norm", "patch_norm"), *both("norm", "norm"))) + blocks("{s}")
TIMM = STEM + KeyMap((*both("layers.{s}.downsample.norm", "stages.{s}.merge.norm"),
                      rule("layers.{s}.downsample.reduction.weight", "stages.{s}.merge.linear.weight")))
OFFICIAL = STEM + KeyMap((*both("layers.{s}.downsample.norm", "stages.{s+1}.merge.norm"),
                          rule("layers.{s}.downsample.reduction.weight", "stages.{s+1}.merge.linear.weight")))


def sizes(state: State, at: str) -> dict[str, Any]:
    """depths, heads, base, patch and window, read off the shapes of a Swin below `at`."""
    stages = count(state, f"{at}layers")
    table = [state[f"{at}layers.{s}.blocks.0.attn.relative_position_bias_table"].shape for s in range(stages)]
    return {"depths": tuple(count(state, f"{at}layers.{s}.blocks") for s in range(stages)), "heads": tuple(int(t[1]) for t in table),
            "base": size(state, f"{at}patch_embed.proj.weight"), "patch": size(state, f"{at}patch_embed.proj.weight", 3),
            "window": (round(int(table[0][0]) ** 0.5) + 1) // 2}
