"""MaskFeat as PySlowFast writes it: a state under "model_state", ViT names, a head for every depth that predicts (here one, at the last block).

The tower has no norm of its own there: the one before the dense layer is the head's. The kernels of the histograms are in the file as well.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, State, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body, body_of, count, side, size
from polysense.weights.vit_timm import VISION

TOWER = VISION.at("", "encoder")
KEYMAP = KeyMap((*(r for r in TOWER.rules if not r.ours[0].startswith("encoder.body.norm.")), rule("mask_token", "hide.token"),
                 *both("pred_head.transforms.0.0", "encoder.body.norm"), *both("pred_head.projections.0", "decoder.head")),
                drop=(*TOWER.drop, r"hogs\..*"), alias=(("norm.{rest}", "pred_head.transforms.0.0.{rest}"),))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes: heads are 64 wide, eps is 1e-6, cells are half a patch. UserError for the video model."""
    if "pos_embed" not in state:
        raise UserError("this file has no table of positions: it is the video model (MViTv2)", "name the layout slowfast_video")
    width, patch = size(state, "patch_embed.proj.weight"), size(state, "patch_embed.proj.weight", 3)
    grid, said = side(size(state, "pos_embed", 1)), size(state, "pred_head.projections.0.weight")
    if said != 3 * 9 * 4:
        raise UserError(f"its head predicts {said} numbers of a patch", "2x2 cells of 9 bins in 3 channels are 108; other targets are not read")
    image = grid * patch
    return "paper", {"config.encoder.image_size": image, "config.encoder.patch": patch, "config.target.patch": patch,
                     "config.target.cell": patch // 2, "feed.image.size": image, "feed.train_image.size": image,
                     "config.sampler.hidden": round(0.4 * grid * grid), "config.sampler.least": max(1, round(15 / 196 * grid * grid)),
                     **body("config.encoder.body", width=width, depth=count(state, "blocks"), heads=max(1, width // 64),
                            hidden=size(state, "blocks.0.mlp.fc1.weight"))}


def write(config: Any) -> Dict:
    """Nothing but the check that the authors' code could hold this system."""
    v = config.encoder
    if not hasattr(v, "body"):
        raise UserError("the authors' MaskFeat of pictures cannot hold this system", "name the layout slowfast_video")
    of = body_of(v.body, "slowfast")
    if not hasattr(config.target, "bins") or v.position != "learned" or v.prefix != 1 or v.stem is not None or v.norm_pre is not None \
            or of["act"] != "gelu" or of["eps"] != 1e-6 or of["heads"] != max(1, of["width"] // 64):
        raise UserError("the authors' MaskFeat cannot hold this system", "it has a plain ViT, GELU, eps 1e-6, heads 64 wide, and predicts HOG")
    return {}


SLOWFAST = Layout(of="maskfeat", name="slowfast", keymap=lambda config: KEYMAP, read=read, write=write, config_file="", weights_file="maskfeat.pth")

BLOCK, OURS = "blocks.{i}", "encoder.blocks.{i}"
VIDEO = KeyMap((
    *both("patch_embed.proj", "encoder.patch"), rule("cls_token", "encoder.cls"), rule("mask_token", "hide.token"),
    *both("pred_head.transforms.0.0", "encoder.norm"), *both("pred_head.projections.0", "decoder.head"),
    *both(f"{BLOCK}.norm1", f"{OURS}.norm1"), *both(f"{BLOCK}.norm2", f"{OURS}.norm2"), *both(f"{BLOCK}.proj", f"{OURS}.project"),
    *both(f"{BLOCK}.mlp.fc1", f"{OURS}.mlp.up"), *both(f"{BLOCK}.mlp.fc2", f"{OURS}.mlp.down"),
    *both(f"{BLOCK}.attn.qkv", f"{OURS}.attn.qkv"), *both(f"{BLOCK}.attn.proj", f"{OURS}.attn.out"),
    *(rule(f"{BLOCK}.attn.pool_{n}.weight", f"{OURS}.attn.pool_{n}.conv.weight") for n in "qkv"),
    *(r for n in "qkv" for r in both(f"{BLOCK}.attn.norm_{n}", f"{OURS}.attn.pool_{n}.norm")),
    *(rule(f"{BLOCK}.attn.rel_pos_{a}", f"{OURS}.attn.{b}") for a, b in (("h", "rows"), ("w", "columns"), ("t", "times")))),
    drop=(r"hogs\..*",), alias=(("norm.{rest}", "pred_head.transforms.0.0.{rest}"),))


def read_video(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes. Keys are pooled by 8 in the first block, which no shape shows; cells are half a patch."""
    depth, head = count(state, "blocks"), size(state, "blocks.0.attn.pool_q.weight")
    widths = [size(state, f"blocks.{i}.attn.qkv.weight") // 3 for i in range(depth)]
    sides = [(size(state, f"blocks.{i}.attn.rel_pos_h") + 1) // 2 for i in range(depth)]
    base, later = size(state, "patch_embed.proj.weight"), range(1, depth)
    doubled, halved = tuple(i for i in later if widths[i] > widths[i - 1]), tuple(i for i in later if sides[i] < sides[i - 1])
    inside = bool(doubled) and size(state, f"blocks.{doubled[0]}.norm1.weight") < widths[doubled[0]]
    patch, side = 4 << len(halved), 4 * sides[0]
    if size(state, "pred_head.projections.0.weight") != 3 * 9 * 4 or patch < 8:
        raise UserError("its head predicts something else than 2x2 cells of 9 bins in 3 channels", "other targets are not read")
    return "mvit_s", {
        "config.encoder.base": base, "config.encoder.depth": depth, "config.encoder.heads": base // head,
        "config.encoder.widens": "attention" if inside else "mlp",
        "config.encoder.doubled": doubled, "config.encoder.halved": halved,
        "config.encoder.frames": size(state, "blocks.0.attn.rel_pos_t") + 1, "config.encoder.image_size": side,
        "config.target.patch": patch, "config.target.cell": patch // 2, "feed.image.size": side, "feed.video.view.size": side,
        "feed.video.frames": size(state, "blocks.0.attn.rel_pos_t") + 1}


def write_video(config: Any) -> Dict:
    """Nothing but the check that the authors' code could hold this system."""
    if not hasattr(config.target, "every") or not hasattr(config.encoder, "doubled") or (config.encoder.eps, config.encoder.reach) != (1e-6, 8):
        raise UserError("the authors' MaskFeat of clips cannot hold this system", "it has an MViTv2, eps 1e-6, keys pooled by 8, and predicts HOG")
    return {}


SLOWFAST_VIDEO = Layout(of="maskfeat", name="slowfast_video", keymap=lambda config: VIDEO, read=read_video, write=write_video, config_file="",
                        weights_file="maskfeat.pth")
