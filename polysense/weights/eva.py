"""EVA as its authors publish it, pre-trained (`eva_psz14.pt`) and fine-tuned (`eva_21k_1k_336px_psz14_ema_89p6.pt`), and as timm holds the fine-tuned
ones (`eva_giant_patch14_*`): timm's ViT names with `q_bias` and `v_bias` beside a fused qkv; `mask_token` and `lm_head`, or `fc_norm` and `head`."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.keymap import KeyMap, State, both, rule, stack3
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body, body_of, count, image_feed, side, size, within
from polysense.weights.vit_timm import timm_feed, to_timm_feed

OURS = "body.blocks.{i}"
TOWER = KeyMap((
    rule("cls_token", "cls"), rule("pos_embed", "position"), *both("patch_embed.proj", "patch"), *both("norm", "body.norm"),
    rule("blocks.{i}.attn.qkv.weight", tuple(f"{OURS}.attn.{n}.weight" for n in "qkv"), stack3),
    *(rule(f"blocks.{{i}}.attn.{n}_bias", f"{OURS}.attn.{n}.bias") for n in "qv"),
    *both("blocks.{i}.attn.proj", f"{OURS}.attn.out"), *both("blocks.{i}.norm1", f"{OURS}.norm1"), *both("blocks.{i}.norm2", f"{OURS}.norm2"),
    *both("blocks.{i}.mlp.fc1", f"{OURS}.mlp.up"), *both("blocks.{i}.mlp.fc2", f"{OURS}.mlp.down")))
KEYMAP = KeyMap((*TOWER.at("", "encoder").rules, rule("mask_token", "hide.token"), *both("lm_head", "decoder.head")), own=(r"target\..*",))
CLASSIFIER = KeyMap((*TOWER.at("", "backbone").rules, *both("fc_norm", "head.norm"), *both("head", "head.out")))
HEADS = {1408: 16}                           # by width, where heads are not 64 wide
EPS = 1e-6
GATES = ("blocks.0.mlp.fc1_g.weight", "blocks.0.mlp.w1.weight")                 # of EVA-02, in timm's words and its authors'


def _heads(width: int) -> int:
    return HEADS.get(width, max(1, width // 64))


def _tower(at: str, state: State, heads: int = 0) -> Dict:
    """Overrides of the tower at a dotted path, from the shapes."""
    width, patch = size(state, "patch_embed.proj.weight"), size(state, "patch_embed.proj.weight", 3)
    return {f"{at}.image_size": patch * side(size(state, "pos_embed", 1)), f"{at}.patch": patch,
            **body(f"{at}.body", width=width, depth=count(state, "blocks"), heads=heads or _heads(width),
                   hidden=size(state, "blocks.0.mlp.fc1.weight"))}


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes. The teacher is published on its own (CLIP): of the file's own form, with the width its head has."""
    if "lm_head.weight" not in state:
        raise UserError("this file has no head for features: it is fine-tuned", "read it as eva/baai_classifier")
    tower, said = _tower("config.encoder", state), size(state, "lm_head.weight")
    image, patch = tower["config.encoder.image_size"], tower["config.encoder.patch"]
    places = (image // patch) ** 2
    return "paper", {
        **tower, "config.target.width": said, "config.target.head.out": said,
        "config.target.tower.image_size": image, "config.target.tower.patch": patch, "config.sampler.hidden": round(105 / 256 * places),
        "config.sampler.least": max(1, round(16 / 256 * places)), "feed.image.size": image, "feed.train_image.size": image}


def _read_classifier(state: State, heads: int) -> Dict:
    if odd := [k for k in GATES if k in state]:
        raise UserError(f"this file has {odd[0]}: it is EVA-02", "plain blocks are read here, those of EVA-01")
    if "fc_norm.weight" not in state or "head.weight" not in state:
        raise UserError("this file has no classifier behind the mean of the patches",
                        "read a pre-trained one as eva/baai, a whole EVA-CLIP as eva_clip/official or eva_clip/open_clip")
    tower, classes = _tower("config.backbone", state, heads), size(state, "head.weight")
    return {**tower, "config.head.into": tower["config.backbone.body.width"], "config.head.out": classes, "config.mix.classes": classes}


def read_classifier(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes. How pictures are read is not in the file: it is taken to be tuned after pre-training, in the
    colours of ImageNet; those tuned after EVA-CLIP have CLIP's."""
    out = _read_classifier(state, 0)
    return "finetune", out | image_feed(out["config.backbone.image_size"])


def read_timm(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides): sizes from the shapes, the number of heads from `model_args` or the width, how pictures are read from `pretrained_cfg`."""
    out = _read_classifier(state, within(config, "model_args").get("num_heads") or 0)
    return "finetune", out | timm_feed(within(config, "pretrained_cfg"), out["config.backbone.image_size"])


def _checked(tower: Any, layout: str, heads: int = 0) -> Dict:
    """The sizes of a tower. UserError for one that EVA's code does not compute."""
    of = body_of(tower.body, layout, biases=("q v out",))
    if tower.position != "learned" or tower.prefix != 1 or tower.norm_pre is not None or tower.stem is not None or not tower.patch_bias \
            or of["eps"] != EPS or of["act"] != "gelu" or of["heads"] != (heads or _heads(of["width"])):
        raise UserError("the authors' EVA cannot hold this system", "it has learned positions, GELU, eps 1e-6, heads 64 wide (88 of 1408)")
    return of


def write(config: Any) -> Dict:
    """Nothing but the check that the authors' code could hold this system."""
    _checked(config.encoder, "baai")
    return {}


def _checked_classifier(config: Any, layout: str, heads: int = 0) -> Dict:
    tower, head = config.backbone, config.head
    if tower.pool != "mean" or tower.body.norm is not None or getattr(head, "eps", None) != EPS:
        raise UserError(f"the layout {layout!r} means the norm behind the mean of the patches, with eps 1e-6", "keep the run folder")
    return _checked(tower, layout, heads)


def write_classifier(config: Any) -> Dict:
    """Nothing but the check."""
    _checked_classifier(config, "baai_classifier")
    return {}


def write_timm(config: Any) -> Dict:
    """`config.json`: a base architecture and every argument that fixes the sizes."""
    v = config.backbone
    of = _checked_classifier(config, "timm", v.body.heads)
    return {"architecture": "eva_giant_patch14_224", "num_classes": config.head.out, "num_features": of["width"], "global_pool": "avg",
            "model_args": {"img_size": v.image_size, "patch_size": v.patch, "embed_dim": of["width"], "depth": of["depth"], "num_heads": of["heads"],
                           "mlp_ratio": of["hidden"] / of["width"]},
            "pretrained_cfg": {"input_size": [v.channels, v.image_size, v.image_size], "num_classes": config.head.out,
                               "first_conv": "patch_embed.proj", "classifier": "head", "fixed_input_size": True, "custom_load": False}}


def feed(of: Feed) -> Dict:
    """What timm says about pictures."""
    return to_timm_feed(of)


BAAI = Layout(of="eva", name="baai", keymap=lambda config: KEYMAP, read=read, write=write, config_file="", weights_file="eva.pt")
BAAI_CLASSIFIER = Layout(of="eva", name="baai_classifier", keymap=lambda config: CLASSIFIER, read=read_classifier, write=write_classifier,
                         config_file="", weights_file="eva.pt")
TIMM = Layout(of="eva", name="timm", keymap=lambda config: CLASSIFIER, read=read_timm, write=write_timm, feed=feed)
