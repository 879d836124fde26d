"""BEiT: transformers' masked and fine-tuned models, and the released pre-training files (unilm), which hold query, key and value in one."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.keymap import KeyMap, Rule, State, both, rule, stack3
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, act_name, count, hf_feed, side, single, size, to_hf_feed

TARGET = KeyMap((), own=(r"target\..*",))                    # the frozen tokenizer is published on its own


def _blocks(theirs: str, words: dict[str, str]) -> list[Rule]:
    """Norms, MLP and scales of a layer."""
    mine = "body.blocks.{i}"
    return [*both(f"{theirs}.{words['norm1']}", f"{mine}.norm1"), *both(f"{theirs}.{words['norm2']}", f"{mine}.norm2"),
            *both(f"{theirs}.{words['up']}", f"{mine}.mlp.up"), *both(f"{theirs}.{words['down']}", f"{mine}.mlp.down"),
            *both(f"{theirs}.{words['out']}", f"{mine}.attn.out"),
            *(rule(f"{theirs}.{words[f'scale{n}']}", f"{mine}.scale{n}") for n in (1, 2))]


def _hf_tower(layer: str) -> tuple[Rule, ...]:
    mine = "body.blocks.{i}"
    return (rule("embeddings.cls_token", "cls"), *both("embeddings.patch_embeddings.projection", "patch"),
            *_blocks(layer, {"norm1": "layernorm_before", "norm2": "layernorm_after", "up": "mlp.fc1", "down": "mlp.fc2",
                             "out": "attention.o_proj", "scale1": "lambda_1", "scale2": "lambda_2"}),
            *(rule(f"{layer}.attention.{n}_proj.weight", f"{mine}.attn.{n}.weight") for n in "qkv"),
            *(rule(f"{layer}.attention.{n}_proj.bias", f"{mine}.attn.{n}.bias") for n in "qv"))


# Published files name the same things as transformers 4 did.
OLD = (*((f"beit.encoder.layer.{{i}}.{a}", f"beit.layers.{{i}}.{b}") for a, b in (
    ("attention.attention.query.{rest}", "attention.q_proj.{rest}"), ("attention.attention.key.{rest}", "attention.k_proj.{rest}"),
    ("attention.attention.value.{rest}", "attention.v_proj.{rest}"), ("attention.output.dense.{rest}", "attention.o_proj.{rest}"),
    ("attention.attention.relative_position_bias.{rest}", "relative_position_bias.{rest}"),
    ("intermediate.dense.{rest}", "mlp.fc1.{rest}"), ("output.dense.{rest}", "mlp.fc2.{rest}"), ("{rest}", "{rest}"))),
    ("beit.encoder.relative_position_bias.{rest}", "beit.shared_position_bias.{rest}"))
INDEX = (r".*relative_position_index",)


def hf_keymap(config: Any) -> KeyMap:
    tower = KeyMap((*_hf_tower("layers.{i}"), rule("shared_position_bias.relative_position_bias_table", "body.relative.table"))).at("beit", "encoder")
    return KeyMap((*tower.rules, rule("beit.embeddings.mask_token", "hide.token"), *both("layernorm", "encoder.body.norm"),
                   *both("lm_head", "decoder.head")), INDEX, OLD) + TARGET


def classifier_keymap(config: Any) -> KeyMap:
    table = rule("layers.{i}.relative_position_bias.relative_position_bias_table", "body.blocks.{i}.attn.relative.table")
    tower = KeyMap((*_hf_tower("layers.{i}"), table)).at("beit", "backbone")
    return KeyMap((*tower.rules, *both("beit.pooler.layernorm", "head.norm"), *both("classifier", "head.out")),
                  (*INDEX, r"beit\.embeddings\.mask_token"), OLD)


def unilm_keymap(config: Any) -> KeyMap:
    mine = "body.blocks.{i}"
    rules = (rule("cls_token", "cls"), *both("patch_embed.proj", "patch"), *both("norm", "body.norm"),
             rule("rel_pos_bias.relative_position_bias_table", "body.relative.table"),
             rule("blocks.{i}.attn.qkv.weight", tuple(f"{mine}.attn.{n}.weight" for n in "qkv"), stack3),
             *(rule(f"blocks.{{i}}.attn.{n}_bias", f"{mine}.attn.{n}.bias") for n in "qv"),
             *_blocks("blocks.{i}", {"norm1": "norm1", "norm2": "norm2", "up": "mlp.fc1", "down": "mlp.fc2", "out": "attn.proj",
                                     "scale1": "gamma_1", "scale2": "gamma_2"}))
    return KeyMap((*KeyMap(rules).at("", "encoder").rules, rule("mask_token", "hide.token"), *both("lm_head", "decoder.head")), INDEX) + TARGET


def _tower(at: str, *, width: int, depth: int, heads: int, hidden: int, patch: int, grid: int, scale: float, eps: float, shared: bool) -> Dict:
    body = f"{at}.body"
    table = f"{body}.relative" if shared else f"{body}.block.attn.relative"
    return {f"{at}.image_size": grid * patch, f"{at}.patch": patch, f"{body}.width": width, f"{body}.depth": depth, f"{body}.heads": heads,
            f"{body}.block.mlp.hidden": hidden, f"{body}.block.layer_scale": scale, f"{body}.block.norm.eps": eps,
            f"{table}.grid": (grid, grid), **({f"{body}.norm.eps": eps} if shared else {"config.head.eps": eps})}


def _grid(rows: int) -> int:
    """Side of the patch grid of a table of so many rows."""
    return (side(rows - 3, 0) + 1) // 2


def _read(config: Dict, table: str, state: State, at: str, shared: bool) -> Dict:
    if config.get("use_absolute_position_embeddings") or not config.get("use_mean_pooling", True):
        raise UserError("this BEiT has absolute positions or pools its class token", "the published ones have relative positions and mean pooling")
    rows = next((v.shape[0] for k, v in state.items() if k.endswith("relative_position_bias_table")), 0)
    if not rows or not config.get(table):
        raise UserError(f"this BEiT has no {table}", "pre-trained files share one table, fine-tuned ones have one a layer")
    width = int(config.get("hidden_size", 768))
    return _tower(at, width=width, depth=int(config.get("num_hidden_layers", 12)), heads=int(config.get("num_attention_heads", 12)),
                  hidden=int(config.get("intermediate_size", 3072)), patch=single(config.get("patch_size", 16)), grid=_grid(rows),
                  scale=float(config.get("layer_scale_init_value", 0.1)), eps=float(config.get("layer_norm_eps", 1e-12)), shared=shared)


def _blocks_of_mask(grid: int) -> Dict:
    """The paper's share of hidden patches, for another grid."""
    return {"config.sampler.hidden": round(75 / 196 * grid * grid), "config.sampler.least": max(1, round(16 / 196 * grid * grid)),
            "config.target.size": grid * 8}


def _without_pictures(feed: Dict) -> Dict:
    """Pixels are normalised by the feed, and taken back to [0,1] for the tokenizer by the same numbers."""
    return feed | {f"config.target.{k}": feed[f"feed.image.{k}"] for k in ("mean", "std") if f"feed.image.{k}" in feed}


def read_hf(config: Dict, state: State) -> tuple[str, Dict]:
    out = _read(config, "use_shared_relative_position_bias", state, "config.encoder", True)
    grid = out["config.encoder.body.relative.grid"][0]
    return "paper", {**out, **_blocks_of_mask(grid), "config.target.codec.encoder.codes": size(state, "lm_head.weight"),
                     **_without_pictures(hf_feed(config, out["config.encoder.image_size"]))}


def read_classifier(config: Dict, state: State) -> tuple[str, Dict]:
    out = _read(config, "use_relative_position_bias", state, "config.backbone", False)
    return "finetune", {**out, "config.head.into": out["config.backbone.body.width"], "config.head.out": size(state, "classifier.weight"),
                        **hf_feed(config, out["config.backbone.image_size"])}


def read_unilm(config: Dict, state: State) -> tuple[str, Dict]:
    table = "rel_pos_bias.relative_position_bias_table"
    grid, width, patch = _grid(size(state, table)), size(state, "patch_embed.proj.weight"), size(state, "patch_embed.proj.weight", 3)
    scale = float(state["blocks.0.gamma_1"].float().abs().mean().clamp(1e-6)) if "blocks.0.gamma_1" in state else 0.1
    out = _tower("config.encoder", width=width, depth=count(state, "blocks"), heads=size(state, table, 1), patch=patch, grid=grid, shared=True,
                 hidden=size(state, "blocks.0.mlp.fc1.weight"), scale=0.1 if scale > 1e-3 else 1e-5, eps=1e-6)
    return "paper", {**out, **_blocks_of_mask(grid), "config.target.codec.encoder.codes": size(state, "lm_head.weight"),
                     "feed.image.size": grid * patch, "feed.train_image.size": grid * patch}


def _write(tower: Any, **more: Any) -> Dict:
    body, block = tower.body, tower.body.block
    if tower.pool != "mean" or tower.position != "none" or block.layer_scale is None or tower.prefix != 1:
        raise UserError("this layout holds BEiT's tower only", "mean pooling, relative positions, layer scale, one class token")
    return {"model_type": "beit", "hidden_size": body.width, "num_hidden_layers": body.depth, "num_attention_heads": body.heads,
            "intermediate_size": block.mlp.hidden or int(block.mlp.ratio * body.width), "hidden_act": act_name(block.mlp.act, "hf"),
            "layer_norm_eps": block.norm.eps, "image_size": tower.image_size, "patch_size": tower.patch, "num_channels": tower.channels,
            "use_absolute_position_embeddings": False, "layer_scale_init_value": block.layer_scale, "use_mean_pooling": True,
            "drop_path_rate": body.drop_path, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **more}


def write_hf(config: Any) -> Dict:
    return _write(config.encoder, architectures=["BeitForMaskedImageModeling"], use_mask_token=True, use_shared_relative_position_bias=True,
                  use_relative_position_bias=False, vocab_size=config.target.codec.codes)


def write_classifier(config: Any) -> Dict:
    names = [str(i) for i in range(config.head.out)]
    return _write(config.backbone, architectures=["BeitForImageClassification"], use_mask_token=False, use_shared_relative_position_bias=False,
                  use_relative_position_bias=True, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})


def _hf_feed(of: Feed) -> Dict:
    return to_hf_feed(of, "BeitImageProcessor")


HF = Layout(of="beit", name="hf", keymap=hf_keymap, read=read_hf, write=write_hf, feed=_hf_feed, beside=("preprocessor_config.json",))
HF_CLASSIFIER = Layout(of="beit", name="hf_classifier", keymap=classifier_keymap, read=read_classifier, write=write_classifier, feed=_hf_feed,
                       beside=("preprocessor_config.json",))
UNILM = Layout(of="beit", name="unilm", keymap=unilm_keymap, read=read_unilm, write=lambda config: {}, config_file="")
