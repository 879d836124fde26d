"""DeiT with its distillation token as the authors and timm save it: ViT's names, `dist_token`, `head` and `head_dist`."""
from typing import Any

import torch

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.keymap import KeyMap, Op, State, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import ALL, NO_QKV, Dict, body, body_of, count, side, size, within
from polysense.weights.vit_timm import EPS, VISION, timm_feed, to_timm_feed

# Two learned tokens [1,1,D] of theirs are one [1,2,D] of ours.
beside = Op("beside", lambda t: [torch.cat(t, 1)], lambda t: list(t[0].chunk(2, 1)))
OWN = (r"teacher\..*",)                      # files hold the student alone


def keymap(config: Any) -> KeyMap:
    """The two tokens, the tower of a ViT, two heads."""
    rest = tuple(r for r in VISION.rules if r.ours != ("cls",))
    return KeyMap((rule(("cls_token", "dist_token"), "vision.cls", beside), *KeyMap(rest).at("", "vision").rules,
                   *both("head", "head"), *both("head_dist", "head_distilled")), own=OWN)


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes. The number of heads is `model_args.num_heads`, else the width by 64, as in every published DeiT."""
    if "dist_token" not in state or "head_dist.weight" not in state:
        raise UserError("this file has no distillation token", "a DeiT without one is a ViT: read it as vit/timm")
    width, patch = size(state, "patch_embed.proj.weight"), size(state, "patch_embed.proj.weight", 3)
    heads = within(config, "model_args").get("num_heads") or max(1, width // 64)
    image, classes, published = patch * side(size(state, "pos_embed", 1), 2), size(state, "head.weight"), within(config, "pretrained_cfg")
    return "paper", {
        "config.vision.image_size": image, "config.vision.patch": patch, "config.vision.prefix": 2, "config.teacher": None,
        **body("config.vision.body", width=width, depth=count(state, "blocks"), heads=heads, hidden=size(state, "blocks.0.mlp.fc1.weight"),
               act="gelu", eps=EPS),
        "config.vision.body.block.attn.bias": ALL if "blocks.0.attn.qkv.bias" in state else NO_QKV,
        "config.head.into": width, "config.head.out": classes, "config.mix.classes": classes, **feed_of(timm_feed(published, image))}


def feed_of(out: Dict) -> Dict:
    """A feed of views has no `train_image`: its views take the size."""
    side = out.pop("feed.train_image.size")
    return out | {f"feed.views.{i}.size": side for i in range(3)}


def write(config: Any) -> Dict:
    """`config.json`: a base architecture and every argument that fixes the sizes."""
    v, of = config.vision, body_of(config.vision.body, "timm", biases=(ALL, NO_QKV))
    if v.norm_pre is not None or v.prefix != 2 or v.stem is not None or not v.patch_bias or of["act"] != "gelu" or of["eps"] != EPS:
        raise UserError("timm's DeiT cannot hold this tower", f"it has two tokens, no norm before the blocks, GELU and eps {EPS}")
    return {"architecture": "deit_base_distilled_patch16_224", "num_classes": config.head.out, "num_features": of["width"], "global_pool": "token",
            "model_args": {"img_size": v.image_size, "patch_size": v.patch, "embed_dim": of["width"], "depth": of["depth"], "num_heads": of["heads"],
                           "mlp_ratio": of["hidden"] / of["width"], "qkv_bias": of["bias"] == ALL},
            "pretrained_cfg": {"input_size": [v.channels, v.image_size, v.image_size], "num_classes": config.head.out,
                               "first_conv": "patch_embed.proj", "classifier": ["head", "head_dist"], "fixed_input_size": True,
                               "custom_load": False}}


def feed(of: Feed) -> Dict:
    """What timm says about pictures."""
    return to_timm_feed(of)


LAYOUT = Layout(of="deit", name="timm", keymap=keymap, read=read, write=write, feed=feed)
