"""The KL auto-encoder as diffusers (AutoencoderKL) and as the original files (`first_stage_model.*`) name it."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.weights.keymap import KeyMap, Rule, State, both, rule
from polysense.weights.sizes import Dict, count, size
from polysense.weights.unet_diffusers import FORMER, pointwise, res_block, spatial_attention
from polysense.weights.unet_sizes import norm

QUANT = (*both("quant_conv", "quant"), *both("post_quant_conv", "post_quant"))
POINTWISE = (("q", "q"), ("k", "k"), ("v", "v"), ("proj_out", "out"))


def diffusers() -> KeyMap:
    """For any KLVAE."""
    return diffusers_halves() + KeyMap(QUANT, own=(r"scale",))


def diffusers_halves() -> KeyMap:
    """`encoder` and `decoder` alone, for any ResEncoder and ResDecoder."""
    rules: list[Rule] = []
    for at, way, turn in (("encoder", "down", "downsamplers.0.conv"), ("decoder", "up", "upsamplers.0.conv")):
        rules += [*both(f"{at}.conv_in", f"{at}.conv_in"), *both(f"{at}.conv_norm_out", f"{at}.norm_out"), *both(f"{at}.conv_out", f"{at}.conv_out"),
                  *res_block(f"{at}.{way}_blocks.{{l}}.resnets.{{i}}", f"{at}.{way}.{{l}}.blocks.{{i}}"),
                  *both(f"{at}.{way}_blocks.{{l}}.{turn}", f"{at}.{way}.{{l}}.{'shrink' if way == 'down' else 'grow'}.conv"),
                  *res_block(f"{at}.mid_block.resnets.0", f"{at}.mid.block1"), *res_block(f"{at}.mid_block.resnets.1", f"{at}.mid.block2"),
                  *spatial_attention(f"{at}.{way}_blocks.{{l}}.attentions.{{i}}", f"{at}.{way}.{{l}}.attn.{{i}}"),
                  *spatial_attention(f"{at}.mid_block.attentions.0", f"{at}.mid.attn")]
    return KeyMap(tuple(rules), alias=tuple((f"{{stem}}.attentions.{{j}}.{old}.{{rest}}", f"{{stem}}.attentions.{{j}}.{new}.{{rest}}")
                                            for old, new in FORMER))


def original(config: Any) -> KeyMap:
    """For a KLVAE.Config."""
    return original_halves(len(config.widths)) + KeyMap(QUANT, own=(r"scale",))


def original_halves(n: int) -> KeyMap:
    """`encoder` and `decoder` of n levels alone; the decoder's count from the largest map here."""
    rules: list[Rule] = []
    names = (("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"), ("nin_shortcut", "shortcut"))

    def block(theirs: str, ours: str) -> None:
        rules.extend(r for t, o in names for r in both(f"{theirs}.{t}", f"{ours}.{o}"))

    def attention(theirs: str, ours: str) -> None:
        rules.extend((*both(f"{theirs}.norm", f"{ours}.norm"),
                      *(rule(f"{theirs}.{t}.weight", f"{ours}.attn.{o}.weight", pointwise) for t, o in POINTWISE),
                      *(rule(f"{theirs}.{t}.bias", f"{ours}.attn.{o}.bias") for t, o in POINTWISE)))

    for at in ("encoder", "decoder"):
        rules += [r for name in ("conv_in", "norm_out", "conv_out") for r in both(f"{at}.{name}", f"{at}.{name}")]
        block(f"{at}.mid.block_1", f"{at}.mid.block1")
        block(f"{at}.mid.block_2", f"{at}.mid.block2")
        attention(f"{at}.mid.attn_1", f"{at}.mid.attn")
    for i in range(n):
        block(f"encoder.down.{i}.block.{{i}}", f"encoder.down.{i}.blocks.{{i}}")
        block(f"decoder.up.{n - 1 - i}.block.{{i}}", f"decoder.up.{i}.blocks.{{i}}")
        attention(f"encoder.down.{i}.attn.{{i}}", f"encoder.down.{i}.attn.{{i}}")
        attention(f"decoder.up.{n - 1 - i}.attn.{{i}}", f"decoder.up.{i}.attn.{{i}}")
        rules += [*both(f"encoder.down.{i}.downsample.conv", f"encoder.down.{i}.shrink.conv"),
                  *both(f"decoder.up.{n - 1 - i}.upsample.conv", f"decoder.up.{i}.grow.conv")]
    return KeyMap(tuple(rules))


def read(config: Dict) -> Any:
    """A KLVAE.Config from `config.json` of an AutoencoderKL."""
    if config.get("_class_name") != "AutoencoderKL":
        raise UserError(f"the auto-encoder is {config.get('_class_name', 'without a config.json')!r}", "an AutoencoderKL is read")
    if config.get("act_fn", "silu") != "silu" or not config.get("mid_block_add_attention", True) or not config.get("use_quant_conv", True) \
            or not config.get("use_post_quant_conv", True):
        raise UserError("this AutoencoderKL is of a later kind", "the one of Stable Diffusion 1 and 2 is read")
    return spec(tuple(config["block_out_channels"]), config.get("layers_per_block", 1), config.get("latent_channels", 4),
                config.get("in_channels", 3), config.get("norm_num_groups", 32))


def from_original(state: State) -> Any:
    """A KLVAE.Config from the shapes of the original files; groups of 32."""
    widths = tuple(size(state, f"encoder.down.{i}.block.0.conv1.weight") for i in range(count(state, "encoder.down")))
    return spec(widths, count(state, "encoder.down.0.block"), size(state, "post_quant_conv.weight"), size(state, "encoder.conv_in.weight", 1), 32)


def spec(widths: tuple[int, ...], depth: int, latents: int, channels: int, groups: int) -> Any:
    return from_dict({"is": "polysense.decoders.kl_vae:KLVAE.Config", "widths": list(widths), "depth": depth, "latents": latents,
                      "channels": channels, "norm": norm(groups, 1e-6)})


def write(c: Any, size: int, scale: float) -> Dict:
    """`config.json` of an AutoencoderKL."""
    n = len(c.widths)
    return {"_class_name": "AutoencoderKL", "in_channels": c.channels, "out_channels": c.channels, "latent_channels": c.latents, "act_fn": "silu",
            "block_out_channels": list(c.widths), "layers_per_block": c.depth, "norm_num_groups": c.norm.groups, "sample_size": size,
            "scaling_factor": scale, "down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
