"""SAM as its authors publish it: one file of weights without a configuration (sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth, sam_vit_h_4b8939.pth)."""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, State, both, lead1, rule, split
from polysense.weights.layout import Layout
from polysense.weights.sam_hf import attention, bare, blocks, check, copies
from polysense.weights.sizes import Dict, count, size

EPS = 1e-5                                                  # of the mask decoder's norms; transformers has 1e-6


def keymap(config: Any) -> KeyMap:
    """SAM without words. Their Sequentials number their members: 0 1 2 3 of the neck, 0 1 3 4 6 of the mask encoder, 0 1 3 of the upscaling."""
    check(config)
    vision, prompt, decoder = "image_encoder", "prompt_encoder", "mask_decoder"
    block, ours = f"{decoder}.transformer.layers.{{i}}", "decoder.blocks.{i}"
    return KeyMap((
        rule(f"{vision}.pos_embed", "vision.position"), *both(f"{vision}.patch_embed.proj", "vision.patch"), *blocks(f"{vision}.blocks", "norm"),
        rule(f"{vision}.neck.0.weight", "vision.neck.conv1.weight"), *both(f"{vision}.neck.1", "vision.neck.norm1"),
        rule(f"{vision}.neck.2.weight", "vision.neck.conv2.weight"), *both(f"{vision}.neck.3", "vision.neck.norm2"),
        rule(f"{prompt}.pe_layer.positional_encoding_gaussian_matrix", "prompt.frequencies"),
        rule((f"{prompt}.not_a_point_embed.weight", *(f"{prompt}.point_embeddings.{i}.weight" for i in range(4))), "prompt.kinds", split(5)),
        rule(f"{prompt}.no_mask_embed.weight", "prompt.no_mask", bare),
        *(r for i, name in ((0, "conv1"), (1, "norm1"), (3, "conv2"), (4, "norm2"), (6, "conv3"))
          for r in both(f"{prompt}.mask_downscaling.{i}", f"prompt.mask.{name}")),
        rule(f"{decoder}.iou_token.weight", "decoder.iou_token"), rule(f"{decoder}.mask_tokens.weight", "decoder.mask_tokens"),
        *attention(f"{block}.self_attn", f"{ours}.own"), *attention(f"{block}.cross_attn_token_to_image", f"{ours}.to_image"),
        *attention(f"{block}.cross_attn_image_to_token", f"{ours}.to_tokens"),
        *(r for n in (1, 2, 3, 4) for r in both(f"{block}.norm{n}", f"{ours}.norm{n}")),
        *both(f"{block}.mlp.lin1", f"{ours}.mlp.up"), *both(f"{block}.mlp.lin2", f"{ours}.mlp.down"),
        *attention(f"{decoder}.transformer.final_attn_token_to_image", "decoder.last"),
        *both(f"{decoder}.transformer.norm_final_attn", "decoder.norm"),
        *(r for i, name in ((0, "conv1"), (1, "norm"), (3, "conv2")) for r in both(f"{decoder}.output_upscaling.{i}", f"decoder.upscale.{name}")),
        *copies([[f"{decoder}.output_hypernetworks_mlps.{m}.layers.{i}" for m in range(1 + config.decoder.candidates)] for i in range(3)]),
        *(rule(f"{decoder}.iou_prediction_head.layers.{{i}}.{p}", f"decoder.judge.layers.{{i}}.{p}", lead1) for p in ("weight", "bias")),
    ))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes alone: a block with the shorter tables of relative positions attends within windows."""
    width, patch, depth = size(state, "image_encoder.pos_embed", 3), size(state, "image_encoder.patch_embed.proj.weight", 3), \
        count(state, "image_encoder.blocks")
    side, out = size(state, "image_encoder.pos_embed", 1), size(state, "image_encoder.neck.0.weight")
    tables = [size(state, f"image_encoder.blocks.{i}.attn.rel_pos_h") for i in range(depth)]
    head = size(state, "image_encoder.blocks.0.attn.rel_pos_h", 1)
    whole, image = tuple(i for i, n in enumerate(tables) if n == 2 * side - 1), side * patch
    within_windows = [n for n in tables if n != 2 * side - 1]
    # the heads of the mask decoder leave no trace in the shapes: all released ones have 8
    return "vit_b", {
        "config.vision.image_size": image, "config.vision.patch": patch, "config.vision.body": width, "config.vision.depth": depth,
        "config.vision.heads": width // head, "config.vision.hidden": size(state, "image_encoder.blocks.0.mlp.lin1.weight"),
        "config.vision.window": (within_windows[0] + 1) // 2 if within_windows else 14, "config.vision.whole": whole, "config.vision.width": out,
        "config.prompt.width": out, "config.prompt.image_size": image,
        "config.prompt.mask_width": size(state, "prompt_encoder.mask_downscaling.3.weight"),
        "config.decoder.width": out, "config.decoder.hidden": size(state, "mask_decoder.transformer.layers.0.mlp.lin1.weight"),
        "config.decoder.depth": count(state, "mask_decoder.transformer.layers"),
        "config.decoder.candidates": size(state, "mask_decoder.mask_tokens.weight") - 1,
        "config.decoder.judge": size(state, "mask_decoder.iou_prediction_head.layers.0.weight"),
        "config.decoder.judge_depth": count(state, "mask_decoder.iou_prediction_head.layers"), "config.decoder.eps": EPS, "feed.image.size": image}


def write(config: Any) -> Dict:
    """They have no configuration: what cannot be told from shapes must be as released."""
    check(config)
    if config.decoder.heads != 8 or config.decoder.eps != EPS or config.vision.eps != 1e-6:
        raise UserError(f"the authors' code has 8 heads and eps {EPS} in the mask decoder, this one {config.decoder.heads} and {config.decoder.eps}",
                        "export to hf")
    return {}


LAYOUT = Layout(of="sam", name="official", keymap=keymap, read=read, write=write, config_file="", weights_file="sam.safetensors")
