"""VQ-GAN as it is published: the checkpoints of taming-transformers (codec, critic and LPIPS in one file) and diffusers' VQModel (codec alone)."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.weights import kl_vae, lpips
from polysense.weights.keymap import KeyMap, State, batch_norm, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, count, image_feed, size
from polysense.weights.unet_diffusers import pointwise
from polysense.weights.unet_sizes import norm

QUANT = (*both("quant_conv", "codec.encoder.quant"), *both("post_quant_conv", "codec.decoder.quant"))
CODEBOOK = rule("quantize.embedding.weight", "codec.quantizer.codebook")
DRAWN = (rule("quantize.embed.weight", "codec.quantizer.codebook"), rule("quantize.proj.weight", "codec.quantizer.head.weight", pointwise),
         rule("quantize.proj.bias", "codec.quantizer.head.bias"))
OWN = (r"prior\..*", r"condition\..*", r"met", r"codec\.quantizer\.(count|temperature)")      # another file's, or needed in training only
JUDGES = (r"critic\..*", r"perceptual\..*")


def drawn(config: Any) -> bool:
    """Whether it is the Gumbel variant."""
    return hasattr(config.codec.quantizer, "temperature")


def taming_map(config: Any) -> KeyMap:
    """Files without the losses' networks are read too."""
    rules = [*QUANT, *(DRAWN if drawn(config) else (CODEBOOK,))]
    for i in (0, *range(2, 3 * config.critic.depth + 3, 3)):
        rules += both(f"loss.discriminator.main.{i}", f"critic.layers.{i}")
    for i in range(1, config.critic.depth + 1):
        rules += batch_norm(f"loss.discriminator.main.{3 * i}", f"critic.layers.{3 * i}")
    return (kl_vae.original_halves(len(config.codec.encoder.widths)).at("", "codec") + KeyMap(tuple(rules), own=(*OWN, *JUDGES))
            + lpips.keymap(config.perceptual).at("loss.perceptual_loss", "perceptual"))


def diffusers_map(config: Any) -> KeyMap:
    if drawn(config):
        raise UserError("diffusers' VQModel has no codes that are drawn", "the layout taming has")
    return kl_vae.diffusers_halves().at("", "codec") + KeyMap((*QUANT, CODEBOOK), own=(*OWN, *JUDGES))


def codec(widths: tuple[int, ...], depth: int, maps: int, dim: int, codes: int, attend: tuple[int, ...], channels: int, groups: int,
          soft: bool) -> Any:
    """A VQCodec.Config."""
    ladder: Dict = {"widths": list(widths), "depth": depth, "maps": maps, "attend": list(attend), "code": dim, "channels": channels,
                    "norm": norm(groups, 1e-6)}
    kind = "gumbel:GumbelQuantizer" if soft else "vq_codec:VectorQuantizer"
    return from_dict({
        "is": "polysense.decoders.vq_codec:VQCodec.Config", "encoder": {"is": "polysense.decoders.res_codec:ResEncoder.Config", **ladder},
        "quantizer": {"is": f"polysense.decoders.{kind}.Config", "codes": codes, "width": dim},
        "decoder": {"is": "polysense.decoders.res_codec:ResDecoder.Config", **ladder}})


def read_taming(config: Dict, state: State) -> tuple[str, Dict]:
    """Sizes from the shapes; groups of 32, the size of the pictures is the preset's."""
    soft = "quantize.embed.weight" in state
    book = "quantize.embed.weight" if soft else "quantize.embedding.weight"
    levels = count(state, "encoder.down")
    widths = tuple(size(state, f"encoder.down.{i}.block.0.conv1.weight") for i in range(levels))
    attend = tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.weight" in state)
    made = codec(widths, count(state, "encoder.down.0.block"), size(state, "post_quant_conv.weight"), size(state, book, 1), size(state, book),
                 attend, size(state, "encoder.conv_in.weight", 1), 32, soft)
    out: Dict = {"config.codec": made, "config.prior.codes": made.codes}
    if "loss.discriminator.main.0.weight" in state:
        norms = sum(k.startswith("loss.discriminator.main.") and k.endswith("running_mean") for k in state)
        out |= {"config.critic.width": size(state, "loss.discriminator.main.0.weight"), "config.critic.depth": norms}
    return "gumbel" if soft else "paper", out


def read_diffusers(config: Dict, state: State) -> tuple[str, Dict]:
    if config.get("_class_name") != "VQModel":
        raise UserError(f"this is {config.get('_class_name', 'a folder without a config.json')!r}", "a VQModel is read")
    if config.get("act_fn", "silu") != "silu" or config.get("norm_type", "group") != "group" or not config.get("mid_block_add_attention", True):
        raise UserError("this VQModel is of a later kind", "the one of latent diffusion is read")
    downs, widths, maps = config["down_block_types"], tuple(config["block_out_channels"]), config.get("latent_channels", 3)
    made = codec(widths, config.get("layers_per_block", 1), maps, config.get("vq_embed_dim") or maps, config.get("num_vq_embeddings", 256),
                 tuple(i for i, kind in enumerate(downs) if kind.startswith("Attn")), config.get("in_channels", 3),
                 config.get("norm_num_groups", 32), False)
    return "paper", {"config.codec": made, "config.prior.codes": made.codes, **image_feed(config.get("sample_size", 256))}


def write_diffusers(config: Any) -> Dict:
    c, n = config.codec.encoder, len(config.codec.encoder.widths)
    kinds = ["Attn" if i in c.attend else "" for i in range(n)]
    return {"_class_name": "VQModel", "in_channels": c.channels, "out_channels": c.channels, "latent_channels": c.maps, "vq_embed_dim": c.code,
            "num_vq_embeddings": config.codec.codes, "block_out_channels": list(c.widths), "layers_per_block": c.depth,
            "norm_num_groups": c.norm.groups, "act_fn": "silu", "norm_type": "group",
            "down_block_types": [f"{k}DownEncoderBlock2D" for k in kinds], "up_block_types": [f"{k}UpDecoderBlock2D" for k in reversed(kinds)]}


TAMING = Layout(of="vq_gan", name="taming", keymap=taming_map, read=read_taming, write=lambda config: {}, config_file="")
DIFFUSERS = Layout(of="vq_gan", name="diffusers", keymap=diffusers_map, read=read_diffusers, write=write_diffusers,
                   weights_file="diffusion_pytorch_model.safetensors")
