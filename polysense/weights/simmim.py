"""SimMIM: transformers' SwinForMaskedImageModeling and ViTForMaskedImageModeling, and the authors' files of a Swin (`encoder.*`, `decoder.0.*`)."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights import vit_hf
from polysense.weights.keymap import KeyMap, State, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body_of, count, hf_feed, single, size, to_hf_feed
from polysense.weights.swin_timm import OFFICIAL as SWIN
from polysense.weights.swin_timm import sizes

HEAD = KeyMap(both("decoder.0", "decoder.conv"))
INDEX = (r".*relative_position_index", r".*attn_mask")

# -- Swin as transformers names it ---------------------------------------------------------------------------------------------------------

BLOCK, OURS = "encoder.layers.{s}.blocks.{i}", "stages.{s}.blocks.{i}"
IN_MEMORY = tuple((f"swin.{BLOCK}.{a}", f"swin.{BLOCK}.{b}") for a, b in (
    ("attention.q_proj.{rest}", "attention.self.query.{rest}"), ("attention.k_proj.{rest}", "attention.self.key.{rest}"),
    ("attention.v_proj.{rest}", "attention.self.value.{rest}"), ("attention.o_proj.{rest}", "attention.output.dense.{rest}"),
    ("attention.relative_position_bias.{rest}", "attention.self.{rest}"), ("mlp.fc1.{rest}", "intermediate.dense.{rest}"),
    ("mlp.fc2.{rest}", "output.dense.{rest}")))
HF_SWIN = KeyMap((
    *both("embeddings.patch_embeddings.projection", "patch"), *both("embeddings.norm", "patch_norm"), *both("layernorm", "norm"),
    *(r for t, o in (("query", "q"), ("key", "k"), ("value", "v")) for r in both(f"{BLOCK}.attention.self.{t}", f"{OURS}.attn.{o}")),
    *both(f"{BLOCK}.attention.output.dense", f"{OURS}.attn.out"), rule(f"{BLOCK}.attention.self.relative_position_bias_table", f"{OURS}.table"),
    *both(f"{BLOCK}.layernorm_before", f"{OURS}.norm1"), *both(f"{BLOCK}.layernorm_after", f"{OURS}.norm2"),
    *both(f"{BLOCK}.intermediate.dense", f"{OURS}.mlp.up"), *both(f"{BLOCK}.output.dense", f"{OURS}.mlp.down"),
    *both("encoder.layers.{s}.downsample.norm", "stages.{s+1}.merge.norm"),
    rule("encoder.layers.{s}.downsample.reduction.weight", "stages.{s+1}.merge.linear.weight")))


def hf_keymap(config: Any) -> KeyMap:
    return HF_SWIN.at("swin", "encoder") + KeyMap((rule("swin.embeddings.mask_token", "hide.token"),), INDEX, IN_MEMORY) + HEAD


def _swin(*, image: int, patch: int, base: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int) -> Dict:
    """Overrides of the paper's preset. Cells are 32 px, as in the paper, where that divides the image; else as large as a place of the last map."""
    stride = patch * 2 ** (len(depths) - 1)
    cell = 32 if image % 32 == 0 and 32 % patch == 0 and image > 32 else stride
    return {"config.encoder.patch": patch, "config.encoder.base": base, "config.encoder.depths": depths, "config.encoder.heads": heads,
            "config.encoder.window": window, "config.sampler.side": cell // patch, "config.decoder.stride": stride, "config.decoder.patch": patch,
            "config.target.patch": patch, "feed.image.size": image, "feed.train_image.size": image}


def read_hf(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from `config.json`."""
    if config.get("model_type") != "swin":
        raise UserError("config.json is missing" if not config else f"config.json is of model_type {config.get('model_type')!r}, not 'swin'",
                        "give the folder of a SwinForMaskedImageModeling; that of a ViT is read in the layout hf_vit")
    if config.get("use_absolute_embeddings") or not config.get("qkv_bias", True) or float(config.get("mlp_ratio", 4.0)) != 4.0 \
            or config.get("hidden_act", "gelu") != "gelu":
        raise UserError("this Swin has absolute positions, no biases, another activation or another ratio of its MLP", "the published ones have not")
    image = single(config.get("image_size", 224))
    return "paper", {**hf_feed(config, image),
                     **_swin(image=image, patch=single(config.get("patch_size", 4)), base=int(config.get("embed_dim", 96)),
                             depths=tuple(config.get("depths", (2, 2, 6, 2))), heads=tuple(config.get("num_heads", (3, 6, 12, 24))),
                             window=int(config.get("window_size", 7))),
                     "config.encoder.norm.eps": float(config.get("layer_norm_eps", 1e-5))}


def _is_swin(config: Any) -> Any:
    if not hasattr(config.encoder, "window"):
        raise UserError("this layout holds a Swin, this system has another encoder", "export a ViT to hf_vit")
    return config.encoder


def write_hf(config: Any) -> Dict:
    """`config.json` of a SwinForMaskedImageModeling."""
    v, stride = _is_swin(config), config.decoder.stride
    return {"architectures": ["SwinForMaskedImageModeling"], "model_type": "swin", "dtype": "float32", "patch_size": v.patch, "embed_dim": v.base,
            "depths": list(v.depths), "num_heads": list(v.heads), "window_size": v.window, "encoder_stride": stride, "num_channels": 3,
            "mlp_ratio": 4.0, "qkv_bias": True, "hidden_act": "gelu", "layer_norm_eps": v.norm.eps, "use_absolute_embeddings": False,
            "hidden_size": v.width, "num_layers": len(v.depths), "drop_path_rate": v.drop_path}


def feed_hf(of: Feed) -> Dict:
    """`preprocessor_config.json`, and the side of the picture, which this system's configuration does not hold."""
    return to_hf_feed(of, "ViTImageProcessor") | ({"image_size": of.image.size} if of.image is not None else {})


# -- the authors' files ----------------------------------------------------------------------------------------------------------------------

def official_keymap(config: Any) -> KeyMap:
    return SWIN.at("encoder", "encoder") + KeyMap((rule("encoder.mask_token", "hide.token"),), INDEX) + HEAD


def read_official(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes. The side of the picture is not in the file: that at which the last map is one window."""
    found = sizes(state, "encoder.")
    patch, window = found["patch"], found["window"]
    image = patch * 2 ** (count(state, "encoder.layers") - 1) * window
    return "paper", _swin(image=image, patch=patch, base=found["base"], depths=found["depths"], heads=found["heads"], window=window)


def write_official(config: Any) -> Dict:
    """Nothing but the check that the authors' code could hold this system."""
    if _is_swin(config).norm.eps != 1e-5:
        raise UserError("the authors' Swin has eps 1e-5", "export to hf, which says its own")
    return {}


# -- a ViT -------------------------------------------------------------------------------------------------------------------------------------

def vit_keymap(config: Any) -> KeyMap:
    tower = KeyMap(vit_hf.VISION.rules, alias=vit_hf.VISION.alias)
    return tower.at("vit", "encoder") + KeyMap((rule("vit.embeddings.mask_token", "hide.token"),)) + HEAD


def read_vit(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from `config.json`. Cells are twice a patch where that divides the grid."""
    if config.get("model_type") != "vit":
        raise UserError("config.json is missing" if not config else f"config.json is of model_type {config.get('model_type')!r}, not 'vit'",
                        "give the folder of a ViTForMaskedImageModeling; that of a Swin is read in the layout hf")
    image, patch = single(config.get("image_size", 224)), single(config.get("patch_size", 16))
    if size(state, "decoder.0.weight") != patch * patch * 3:
        raise UserError(f"its head draws {size(state, 'decoder.0.weight')} numbers for a patch of {patch} px", "encoder_stride must be patch_size")
    return "plain_vit_b_16", {**vit_hf.sizes(config, "config.encoder"), **hf_feed(config, image), "config.decoder.stride": patch,
                              "config.decoder.patch": patch, "config.target.patch": patch,
                              "config.sampler.side": 2 if image // patch % 2 == 0 else 1}


def write_vit(config: Any) -> Dict:
    """`config.json` of a ViTForMaskedImageModeling."""
    v = config.encoder
    if not hasattr(v, "position") or v.position != "learned" or v.norm_pre is not None or v.prefix != 1 or v.stem is not None or not v.patch_bias:
        raise UserError("transformers' ViT cannot hold this encoder", "it has learned absolute positions and one class token; export a Swin to hf")
    of = body_of(v.body, "hf_vit")
    return {"architectures": ["ViTForMaskedImageModeling"], "model_type": "vit", "dtype": "float32", "image_size": v.image_size,
            "patch_size": v.patch, "encoder_stride": v.patch, "num_channels": v.channels, "hidden_size": of["width"],
            "num_hidden_layers": of["depth"], "num_attention_heads": of["heads"], "intermediate_size": of["hidden"], "hidden_act": of["act"],
            "layer_norm_eps": of["eps"], "qkv_bias": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


HF = Layout(of="simmim", name="hf", keymap=hf_keymap, read=read_hf, write=write_hf, feed=feed_hf, beside=("preprocessor_config.json",))
HF_VIT = Layout(of="simmim", name="hf_vit", keymap=vit_keymap, read=read_vit, write=write_vit, feed=vit_hf.feed,
                beside=("preprocessor_config.json",))
OFFICIAL = Layout(of="simmim", name="official", keymap=official_keymap, read=read_official, write=write_official, config_file="",
                  weights_file="simmim.pth")
