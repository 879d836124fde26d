"""ViT as timm saves it: `config.json` with the architecture and the arguments that differ from it, one fused qkv a block."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.keymap import KeyMap, State, both, rule, stack3
from polysense.weights.layout import Layout
from polysense.weights.sizes import ALL, NO_QKV, Dict, body, body_of, count, empty_head, image_feed, side, single, size, within

HEADS = {"tiny": 3, "small": 6, "medium": 8, "base": 12, "large": 16, "huge": 16, "giant": 16, "gigantic": 16}     # by the architecture's name
EPS = 1e-6
PLAIN = ("norm_pre.weight", "fc_norm.weight", "reg_token", "pre_logits.fc.weight", "dist_token", "head_dist.weight", "attn_pool.latent")

VISION = KeyMap((
    rule("cls_token", "cls"), rule("pos_embed", "position"), *both("patch_embed.proj", "patch"), *both("norm", "body.norm"),
    *(rule(f"blocks.{{i}}.attn.qkv.{p}", tuple(f"body.blocks.{{i}}.attn.{n}.{p}" for n in "qkv"), stack3) for p in ("weight", "bias")),
    *both("blocks.{i}.attn.proj", "body.blocks.{i}.attn.out"),
    *both("blocks.{i}.norm1", "body.blocks.{i}.norm1"), *both("blocks.{i}.norm2", "body.blocks.{i}.norm2"),
    *both("blocks.{i}.mlp.fc1", "body.blocks.{i}.mlp.up"), *both("blocks.{i}.mlp.fc2", "body.blocks.{i}.mlp.down"),
    *(rule(f"blocks.{{i}}.ls{n}.gamma", f"body.blocks.{{i}}.scale{n}") for n in (1, 2)),
))


def keymap(config: Any) -> KeyMap:
    """A Classifier of a ViT and a dense head, or no head."""
    return VISION.at("", "backbone") + KeyMap(both("head", "head"))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides): sizes from the shapes; the number of heads, which no shape shows, from `model_args` or the architecture's name."""
    if odd := [k for k in PLAIN if k in state]:
        raise UserError(f"this timm ViT has {odd[0]}", "only the plain ViT (one class token, final norm before the pooling, dense head) is read")
    args, name, published = within(config, "model_args"), str(config.get("architecture", "")), within(config, "pretrained_cfg")
    width, patch = size(state, "patch_embed.proj.weight"), size(state, "patch_embed.proj.weight", 3)
    prefix, pool = int("cls_token" in state), args.get("global_pool", config.get("global_pool", "token"))
    pool = {"token": "cls", "avg": "mean"}.get(pool, pool)
    if pool not in ("cls", "mean") or args.get("no_embed_class"):
        raise UserError(f"this timm ViT has global_pool={pool!r} or positions without the class token", "only 'token' and 'avg' pooling are read")
    if not name and "num_heads" not in args:
        raise UserError("config.json is missing", "put timm's config.json beside the weights: the number of heads is not in them")
    heads = args.get("num_heads") or next((n for word, n in HEADS.items() if f"vit_{word}" in name), 0)
    if not heads:
        raise UserError(f"the number of heads of {name!r} is not known here", "add model_args.num_heads to config.json")
    image = patch * side(size(state, "pos_embed", 1), prefix)
    classes = state["head.weight"].shape[0] if "head.weight" in state else 0
    out: Dict = {
        "config.backbone.image_size": image, "config.backbone.patch": patch, "config.backbone.prefix": prefix, "config.backbone.pool": pool,
        **body("config.backbone.body", width=width, depth=count(state, "blocks"), heads=heads, hidden=size(state, "blocks.0.mlp.fc1.weight"),
               act="quick_gelu" if "quickgelu" in name else "gelu", eps=EPS),
        "config.backbone.body.block.attn.bias": ALL if "blocks.0.attn.qkv.bias" in state else NO_QKV,
        "config.backbone.body.block.layer_scale": 1.0 if "blocks.0.ls1.gamma" in state else None,
        **({"config.head.into": width, "config.head.out": classes} if classes else {"config.head": empty_head()}),
        **timm_feed(published, image)}
    return "finetune", out


def timm_feed(published: Dict, image: int) -> Dict:
    """Overrides of a preset's feed from timm's `pretrained_cfg`."""
    return image_feed(image, mean=published.get("mean"), std=published.get("std"), resample=published.get("interpolation", ""),
                      fit="squash" if published.get("crop_mode") == "squash" else "crop")


def to_timm_feed(of: Feed) -> Dict:
    """The inverse, under "pretrained_cfg"."""
    plan = of.image
    return {} if plan is None else {"pretrained_cfg": {
        "mean": list(plan.mean), "std": list(plan.std), "interpolation": plan.resample, "crop_pct": 1.0,
        "crop_mode": "center" if plan.fit == "crop" else "squash"}}


def write(config: Any) -> Dict:
    """`config.json`: a base architecture and every argument that fixes the sizes."""
    v, of = config.backbone, body_of(config.backbone.body, "timm", scales="some", biases=(ALL, NO_QKV))
    plain = v.norm_pre is None and v.prefix <= 1 and v.stem is None and v.patch_bias and v.pool in ("cls", "mean")
    if not plain or hasattr(config.head, "hidden"):
        raise UserError("timm's plain ViT cannot hold this tower or head", "it has at most one class token, no norm before the blocks, a dense head")
    if of["act"] != "gelu" or of["eps"] != EPS:
        raise UserError(f"timm's ViT has GELU and eps {EPS}, this one {of['act']} and {of['eps']}", "export to hf")
    classes = getattr(config.head, "out", 0)
    pool = "token" if v.pool == "cls" else "avg"
    args: Dict = {"img_size": single(v.image_size), "patch_size": v.patch, "embed_dim": of["width"], "depth": of["depth"], "num_heads": of["heads"],
                  "mlp_ratio": of["hidden"] / of["width"], "qkv_bias": of["bias"] == ALL, "class_token": bool(v.prefix),
                  **({"fc_norm": False, "global_pool": "avg"} if pool == "avg" else {}),
                  **({"init_values": v.body.block.layer_scale} if v.body.block.layer_scale is not None else {})}
    return {"architecture": "vit_base_patch16_224", "num_classes": classes, "num_features": of["width"], "global_pool": pool, "model_args": args,
            "pretrained_cfg": {"input_size": [v.channels, v.image_size, v.image_size], "num_classes": classes, "first_conv": "patch_embed.proj",
                               "classifier": "head", "fixed_input_size": True, "custom_load": False}}


LAYOUT = Layout(of="vit", name="timm", keymap=keymap, read=read, write=write, feed=to_timm_feed)
