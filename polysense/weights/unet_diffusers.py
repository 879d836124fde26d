"""U-Nets as diffusers names them: UNet2DModel, UNet2DConditionModel and the encoder half in ControlNetModel."""
from typing import Any

from polysense.weights.keymap import KeyMap, Op, Rule, both, rule, same, stack

FORMER = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))        # names in files of 2022


def _flat(n: int) -> Op:
    return Op("pointwise", lambda t: [x.reshape(x.shape[:2]) for x in t], lambda t: [x.reshape(*x.shape, *(1,) * n) for x in t])


pointwise = _flat(2)                                        # a 1x1 convolution [O,I,1,1] and our linear [O,I]; reads [O,I] too
linear = _flat(0)                                           # the same, written as a linear


def res_block(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Both may hold placeholders."""
    names = (("norm1", "norm1"), ("conv1", "conv1"), ("time_emb_proj", "time"), ("norm2", "norm2"), ("conv2", "conv2"), ("conv_shortcut", "shortcut"))
    return tuple(r for t, o in names for r in both(f"{theirs}.{t}", f"{ours}.{o}"))


def spatial_attention(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (*both(f"{theirs}.group_norm", f"{ours}.norm"),
            *(rule(f"{theirs}.{t}.{p}", f"{ours}.attn.{o}.{p}", linear if p == "weight" else same)
              for t, o in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out")) for p in ("weight", "bias")))


def spatial_transformer(theirs: str, ours: str, join: str) -> tuple[Rule, ...]:
    """The names inside are the same in diffusers and in the original files."""
    at, op, block, mine = theirs, pointwise if join == "conv" else linear, f"{theirs}.transformer_blocks.{{k}}", f"{ours}.body.blocks.{{k}}"
    return (
        *both(f"{at}.norm", f"{ours}.norm"),
        *(rule(f"{at}.{n}.weight", f"{ours}.{n}.weight", op) for n in ("proj_in", "proj_out")),
        *(rule(f"{at}.{n}.bias", f"{ours}.{n}.bias") for n in ("proj_in", "proj_out")),
        *both(f"{block}.norm1", f"{mine}.norm1"), *both(f"{block}.norm2", f"{mine}.norm_cross"), *both(f"{block}.norm3", f"{mine}.norm2"),
        *(r for n, o in (("attn1", "attn"), ("attn2", "cross")) for t, u in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out"))
          for r in both(f"{block}.{n}.{t}", f"{mine}.{o}.{u}")),
        *(rule(f"{block}.ff.net.0.proj.{p}", (f"{mine}.mlp.up.{p}", f"{mine}.mlp.gate.{p}"), stack(2)) for p in ("weight", "bias")),
        *both(f"{block}.ff.net.2", f"{mine}.mlp.down"))


def attention(spec: Any, theirs: str, ours: str) -> tuple[Rule, ...]:
    """The rules of a level's attention, whichever it is."""
    if spec is None:
        return ()
    return spatial_transformer(theirs, ours, spec.join) if hasattr(spec, "source") else spatial_attention(theirs, ours)


def half(config: Any) -> KeyMap:
    """The way down and the middle, for a UNetHalf.Config."""
    rules = [*both("conv_in", "conv_in"), *both("time_embedding.linear_1", "time.up"), *both("time_embedding.linear_2", "time.down"),
             *res_block("down_blocks.{l}.resnets.{i}", "down.{l}.blocks.{i}"), *both("down_blocks.{l}.downsamplers.0.conv", "down.{l}.shrink.conv"),
             *res_block("mid_block.resnets.0", "mid.block1"), *res_block("mid_block.resnets.1", "mid.block2"),
             *attention(config.mid, "mid_block.attentions.0", "mid.attn")]
    for i, level in enumerate(config.levels):
        rules += attention(level.attn, f"down_blocks.{i}.attentions.{{j}}", f"down.{i}.attn.{{j}}")
    return KeyMap(tuple(rules), alias=tuple((f"{{stem}}.attentions.{{j}}.{old}.{{rest}}", f"{{stem}}.attentions.{{j}}.{new}.{{rest}}")
                                            for old, new in FORMER))


def keymap(config: Any) -> KeyMap:
    """The whole network, for a UNet.Config."""
    rules = [*res_block("up_blocks.{l}.resnets.{i}", "up.{l}.blocks.{i}"), *both("up_blocks.{l}.upsamplers.0.conv", "up.{l}.grow.conv"),
             *both("conv_norm_out", "norm_out"), *both("conv_out", "conv_out")]
    for i, level in enumerate(reversed(config.levels)):
        rules += attention(level.attn, f"up_blocks.{i}.attentions.{{j}}", f"up.{i}.attn.{{j}}")
    return half(config) + KeyMap(tuple(rules))
