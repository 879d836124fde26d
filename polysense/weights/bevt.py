"""Video Swin as torchvision names it, and as BEVT's files do (mmaction: `backbone.layers.*`, `cls_head.lm_head`). Of torchvision's the trunk of
clips is read; BEVT's own also hold the way in of pictures, both ways out and the mask token, which a Video Swin under the same names lacks. What a
file does not name (and the tokenizer, which is another file's) stays as it was built."""
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, Op, Rule, State, both, rule, stack3
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, count, size
from polysense.weights.swin_timm import OFFICIAL

OWN = KeyMap((), own=(r"encoder\.still.*", r"decoder\..*", r"target\..*", r"token", r"image_mask\..*", r"video_mask\..*"))


def torchvision_map(config: Any) -> KeyMap:
    rules: list[Rule] = [*both("patch_embed.proj", "patch"), *both("patch_embed.norm", "patch_norm"), *both("norm", "norm")]
    for s in range(len(config.encoder.depths)):
        theirs, ours = f"features.{2 * s}.{{i}}", f"stages.{s}.blocks.{{i}}"
        rules += [*(rule(f"{theirs}.attn.qkv.{p}", tuple(f"{ours}.attn.{n}.{p}" for n in "qkv"), stack3) for p in ("weight", "bias")),
                  *both(f"{theirs}.attn.proj", f"{ours}.attn.out"), rule(f"{theirs}.attn.relative_position_bias_table", f"{ours}.table"),
                  *both(f"{theirs}.norm1", f"{ours}.norm1"), *both(f"{theirs}.norm2", f"{ours}.norm2"),
                  *both(f"{theirs}.mlp.0", f"{ours}.mlp.up"), *both(f"{theirs}.mlp.3", f"{ours}.mlp.down")]
        if s:
            rules += [*both(f"features.{2 * s - 1}.norm", f"stages.{s}.merge.norm"),
                      rule(f"features.{2 * s - 1}.reduction.weight", f"stages.{s}.merge.linear.weight")]
    table = KeyMap(tuple(rules), drop=(r"features\.\d+\.\d+\.attn\.relative_position_index", r"head\..*"))
    return table.at("", "encoder") + OWN


def thin(*axes: int) -> Op:
    """A kernel of three dimensions that is one along `axes`, and the same without them."""
    def load(t: list[Tensor]) -> list[Tensor]:
        if t[0].ndim <= max(axes) or any(t[0].shape[a] != 1 for a in axes):
            raise ValueError(f"it is not of length one along {' and '.join(map(str, axes))}")
        return [t[0].squeeze(tuple(axes))]

    def save(t: list[Tensor]) -> list[Tensor]:
        out = t[0]
        for a in sorted(axes):
            out = out.unsqueeze(a)
        return [out]
    return Op(f"thin{''.join(map(str, axes))}", load, save)


def convolved(theirs: str, ours: str, axes: Sequence[int]) -> tuple[Rule, ...]:
    return rule(f"{theirs}.weight", f"{ours}.weight", thin(*axes)), rule(f"{theirs}.bias", f"{ours}.bias")


def mmaction_map(config: Any) -> KeyMap:
    heads = KeyMap((
        *both("backbone.patch_embed_2d.proj", "encoder.still"), *both("backbone.patch_embed_2d.norm", "encoder.still_norm"),
        *both("backbone.fpn.0", "decoder.still.grow"), *both("backbone.lm_down", "decoder.still.down"),
        *convolved("backbone.fpn_s.0", "decoder.moving.grow", (2,)), *both("backbone.lm_down_st.0", "decoder.moving.down"),
        *convolved("backbone.fpn_t.0", "decoder.times", (3, 4)), rule("backbone.mask_token", "token"),
        *both("cls_head.lm_head", "decoder.classify")), drop=(r"cls_head\.(?!lm_head\.).*", r"dvae\..*"))
    return OFFICIAL.at("backbone", "encoder") + heads + OWN


def read(state: State, blocks: list[str], patch: str) -> tuple[str, Dict]:
    """Sizes from the shapes; the window, which a table does not show, is 8 x 7 x 7. `blocks`: where those of each stage are."""
    kernel = state.get(patch)
    if kernel is None or kernel.ndim != 5:
        raise UserError(f"the file lacks {patch} of five axes", "a Video Swin is read")
    return "paper", {"config.encoder.base": kernel.shape[0], "config.encoder.patch": tuple(kernel.shape[2:]),
                     "config.encoder.depths": tuple(count(state, b) for b in blocks),
                     "config.encoder.heads": tuple(size(state, f"{b}.0.attn.relative_position_bias_table", 1) for b in blocks)}


def read_torchvision(config: Dict, state: State) -> tuple[str, Dict]:
    return read(state, [f"features.{2 * s}" for s in range((count(state, "features") + 1) // 2)], "patch_embed.proj.weight")


def read_mmaction(config: Dict, state: State) -> tuple[str, Dict]:
    return read(state, [f"backbone.layers.{s}.blocks" for s in range(count(state, "backbone.layers"))], "backbone.patch_embed.proj.weight")


TORCHVISION = Layout(of="bevt", name="torchvision", keymap=torchvision_map, read=read_torchvision, write=lambda config: {}, config_file="")
MMACTION = Layout(of="bevt", name="mmaction", keymap=mmaction_map, read=read_mmaction, write=lambda config: {}, config_file="")
