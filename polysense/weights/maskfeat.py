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
    """(preset, overrides) from the shapes: heads are 64 wide, eps is 1e-6, cells are half a patch. UserError for a video model (MViTv2)."""
    if "pos_embed" not in state:
        raise UserError("this file has no table of positions: it is the video model (MViTv2)", "only the image models (ViT) are read")
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
    v, of = config.encoder, body_of(config.encoder.body, "slowfast")
    if not hasattr(config.target, "bins") or v.position != "learned" or v.prefix != 1 or v.stem is not None or v.norm_pre is not None \
            or of["act"] != "gelu" or of["eps"] != 1e-6 or of["heads"] != max(1, of["width"] // 64):
        raise UserError("the authors' MaskFeat cannot hold this system", "it has a plain ViT, GELU, eps 1e-6, heads 64 wide, and predicts HOG")
    return {}


SLOWFAST = Layout(of="maskfeat", name="slowfast", keymap=lambda config: KEYMAP, read=read, write=write, config_file="", weights_file="maskfeat.pth")
