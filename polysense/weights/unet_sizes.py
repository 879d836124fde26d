"""Between the configurations of diffusers' U-Nets and schedulers and ours. Works on values, imports no network."""
from typing import Any, cast

from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.weights.sizes import Dict, single

PIXEL, LATENT = "UNet2DModel", "UNet2DConditionModel"
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
TARGETS = {"epsilon": "noise", "v_prediction": "velocity", "sample": "start"}
PLAIN: Dict = {"resnet_time_scale_shift": "default", "time_embedding_type": "positional", "class_embed_type": None, "center_input_sample": False,
               "mid_block_scale_factor": 1, "dual_cross_attention": False, "only_cross_attention": False, "addition_embed_type": None,
               "encoder_hid_dim": None, "attention_type": "default", "time_cond_proj_dim": None, "attn_norm_num_groups": None}


def each(value: Any, count: int) -> list[Any]:
    """One value for every level."""
    return list(cast(list[Any], value)) if isinstance(value, (list, tuple)) else [value] * count


def norm(groups: int, eps: float) -> Dict:
    return {"is": "polysense.nn.norm:GroupNorm.Config", "groups": groups, "eps": eps}


def read_unet(config: Dict, kind: str, of: str = "polysense.nn.unet:UNet.Config") -> Any:
    """A UNet.Config from `config.json` of a UNet2DModel or UNet2DConditionModel. Raises UserError for what ours does not have."""
    if config.get("_class_name") != kind:
        raise UserError("config.json is missing" if "_class_name" not in config else f"config.json is of a {config['_class_name']}",
                        f"give the folder of a {kind}")
    for name, plain in PLAIN.items():
        if config.get(name, plain) not in (plain, False if plain is None else plain):
            raise UserError(f"this U-Net has {name}={config[name]!r}", f"only {plain!r} is read")
    if config.get("act_fn", "silu") not in ("silu", "swish"):
        raise UserError(f"this U-Net has act_fn={config['act_fn']!r}", "only silu is read")
    widths = config["block_out_channels"]
    n, groups, eps = len(widths), config.get("norm_num_groups", 32), config.get("norm_eps", 1e-5)
    number, depths = each(config.get("attention_head_dim", 8), n), each(config.get("layers_per_block", 2), n)
    if kind == PIXEL:
        attns: list[Dict] = [{"is": "polysense.nn.spatial:SpatialAttention.Config", "heads": w // h if h else 1, "norm": norm(groups, eps)}
                             for w, h in zip(widths, number, strict=True)]
    else:
        deep = each(config.get("transformer_layers_per_block", 1), n)
        attns = [{"is": "polysense.nn.spatial:SpatialTransformer.Config", "heads": h, "depth": d, "source": config["cross_attention_dim"],
                  "norm": norm(groups, 1e-6), "join": "linear" if config.get("use_linear_projection") else "conv"}
                 for h, d in zip(number, deep, strict=True)]
    levels = [{"is": "polysense.nn.unet:Level", "width": w, "depth": d, "attn": a if "Attn" in name else None}
              for w, d, a, name in zip(widths, depths, attns, config["down_block_types"], strict=True)]
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None and config.get("add_attention", True)
    out = config.get("out_channels", config["in_channels"])
    return from_dict({
        "is": of, "levels": levels, "channels": config["in_channels"], "out": 0 if out == config["in_channels"] else out,
        "mid": attns[-1] if middle else None, "pad": "both" if config.get("downsample_padding", 1) else "end",
        "block": {"is": "polysense.nn.spatial:ResBlock.Config", "norm": norm(groups, eps), "dropout": float(config.get("dropout") or 0.0)},
        "time": {"is": "polysense.nn.time:SinusoidalTime.Config", "shift": float(config.get("freq_shift", 0)),
                 "order": "cos sin" if config.get("flip_sin_to_cos", True) else "sin cos"}})


def write_unet(c: Any, size: int) -> Dict:
    """`config.json` of a UNet.Config; `size` is the side of its maps. Raises UserError where diffusers has no such network."""
    attns = [level.attn for level in c.levels if level.attn is not None] + ([c.mid] if c.mid is not None else [])
    latent = any(hasattr(a, "source") for a in attns)
    if c.mid is None or any(type(a) is not type(attns[0]) for a in attns):
        raise UserError("diffusers has attention of one kind, and some in the middle", "keep the run folder")
    if latent and any(not a.source for a in attns):
        raise UserError("diffusers' UNet2DConditionModel reads a context everywhere", "keep the run folder")
    down = {False: "DownBlock2D", True: "CrossAttnDownBlock2D" if latent else "AttnDownBlock2D"}
    up = {k: v.replace("Down", "Up") for k, v in down.items()}
    seen, widths = [level.attn is not None for level in c.levels], [level.width for level in c.levels]
    heads = [(level.attn or c.mid).heads for level in c.levels]
    shared: Dict = {
        "_class_name": LATENT if latent else PIXEL, "sample_size": size, "in_channels": c.channels, "out_channels": c.out or c.channels,
        "block_out_channels": widths, "down_block_types": [down[s] for s in seen], "up_block_types": [up[s] for s in reversed(seen)],
        "norm_num_groups": c.block.norm.groups, "norm_eps": c.block.norm.eps, "act_fn": "silu", "dropout": c.block.dropout,
        "downsample_padding": int(c.pad == "both"), "flip_sin_to_cos": c.time.order == "cos sin",
        "freq_shift": int(c.time.shift) if c.time.shift == int(c.time.shift) else c.time.shift}
    depths = [level.depth for level in c.levels]
    if latent:
        deep = [(level.attn or c.mid).depth for level in c.levels]
        return shared | {"layers_per_block": depths if len(set(depths)) > 1 else depths[0], "attention_head_dim": heads,
                         "cross_attention_dim": c.mid.source, "transformer_layers_per_block": deep,
                         "use_linear_projection": c.mid.join == "linear"}
    wide = {w // h for w, h, s in zip(widths, heads, seen, strict=True) if s} | {widths[-1] // c.mid.heads}
    one = all(a.heads == 1 for a in attns)
    if len(set(depths)) > 1 or (len(wide) > 1 and not one):
        raise UserError("diffusers' UNet2DModel has one number of blocks a level and one head width", "keep the run folder")
    return shared | {"layers_per_block": depths[0], "attention_head_dim": None if one else wide.pop()}


def read_schedule(config: Dict, at: str = "config") -> Dict:
    """Overrides of a Denoiser.Config at a dotted path from a scheduler's configuration; empty where there is none."""
    if not config:
        return {}
    kind, says = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    if kind not in SCHEDULES or says not in TARGETS or config.get("trained_betas") is not None:
        raise UserError(f"a schedule {kind!r} that predicts {says!r}", f"read are {', '.join(SCHEDULES)} and {', '.join(TARGETS)}")
    ancestral = config.get("_class_name") == "DDPMScheduler"
    return {f"{at}.times": config.get("num_train_timesteps", 1000), f"{at}.schedule": SCHEDULES[kind], f"{at}.predict": TARGETS[says],
            f"{at}.low": float(config.get("beta_start", 1e-4)), f"{at}.high": float(config.get("beta_end", 0.02)),
            f"{at}.clip": float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", ancestral) else None,
            f"{at}.sampler.variance": "small" if config.get("variance_type", "fixed_small").startswith("fixed_small") else "large",
            f"{at}.sampler.spacing": config.get("timestep_spacing", "leading"), f"{at}.sampler.offset": config.get("steps_offset", 0),
            f"{at}.sampler.last": "one" if config.get("set_alpha_to_one", True) else "first"}


def write_schedule(c: Any, kind: str = "DDPMScheduler") -> Dict:
    """The scheduler's configuration of a Denoiser.Config."""
    back, says = {v: k for k, v in SCHEDULES.items()}, {v: k for k, v in TARGETS.items()}
    s = c.sampler
    return {"_class_name": kind, "num_train_timesteps": c.times, "beta_schedule": back[c.schedule], "beta_start": c.low, "beta_end": c.high,
            "prediction_type": says[c.predict], "clip_sample": c.clip is not None, **({"clip_sample_range": c.clip} if c.clip else {}),
            "timestep_spacing": s.spacing, "steps_offset": s.offset,
            **({"variance_type": f"fixed_{s.variance}"} if kind == "DDPMScheduler" else {"set_alpha_to_one": s.last == "one"})}


def square(config: Dict) -> int:
    """`sample_size`, a number or an equal pair. Raises UserError where it is not said."""
    if not config.get("sample_size"):
        raise UserError("config.json does not say the size of the maps", "add sample_size")
    return single(config["sample_size"])
