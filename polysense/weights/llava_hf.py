"""LLaVA: transformers' LlavaForConditionalGeneration (LLaVA-1.5), and the authors' own files, which name the connector `mm_projector`."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights import clip_hf, llama_hf
from polysense.weights.keymap import KeyMap, State, both
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, act_name, body, body_of, hf_feed, image_feed, single, size, to_hf_feed, within

TOWER = "vision_tower.vision_model"
# transformers holds in memory under other names what it publishes
IN_MEMORY = KeyMap((), alias=(
    ("model.language_model.{rest}", "language_model.model.{rest}"), ("lm_head.weight", "language_model.lm_head.weight"),
    ("model.vision_tower.{rest}", "vision_tower.{rest}"), ("model.multi_modal_projector.{rest}", "multi_modal_projector.{rest}"),
    *((f"vision_tower.{n}.{{rest}}", f"{TOWER}.{n}.{{rest}}") for n in ("embeddings", "pre_layrnorm", "encoder", "post_layernorm"))))
VISION_DEFAULTS: Dict = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336,
                         "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


def keymap(config: Any) -> KeyMap:
    """The table for a VisualLM with CLIP's ViT, an MLPConnector and a LLaMA, as transformers publishes it."""
    return (clip_hf.VISION.at(TOWER, "vision.tower") + llama_hf.keymap(config.language).at("language_model", "language")
            + KeyMap((*both("multi_modal_projector.linear_1", "connector.mlp.up"), *both("multi_modal_projector.linear_2", "connector.mlp.down")))
            + IN_MEMORY)


def official(config: Any) -> KeyMap:
    """The table of the authors' files: the language model at the root, the connector and the picture tower inside it.

    LLaVA's connector is one linear, LLaVA-1.5's are the modules 0 and 2 of a sequence.
    """
    plain = not hasattr(config.connector, "act")
    lines = both("model.mm_projector", "connector.project") if plain else (
        *both("model.mm_projector.0", "connector.mlp.up"), *both("model.mm_projector.2", "connector.mlp.down"))
    return (clip_hf.VISION.at("model.vision_tower.vision_tower.vision_model", "vision.tower") + llama_hf.keymap(config.language).at("", "language")
            + KeyMap(lines))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from transformers' `config.json`. Raises UserError for another tower, language model or choice of features."""
    if config.get("model_type") != "llava":
        raise UserError("config.json is missing" if not config else f"config.json is of model_type {config.get('model_type')!r}, not 'llava'",
                        "give the folder of a LlavaForConditionalGeneration")
    text, vision = within(config, "text_config"), {**VISION_DEFAULTS, **within(config, "vision_config")}
    if text.get("model_type", "llama") != "llama" or vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise UserError(f"this LLaVA is of {vision.get('model_type')} and {text.get('model_type')}", "only CLIP's ViT with a LLaMA is read")
    if config.get("vision_feature_select_strategy", "default") != "default" or config.get("projector_hidden_act", "gelu") != "gelu":
        raise UserError("this LLaVA keeps the class token or has another connector", "only the published form is read")
    # the files may leave sizes out that transformers has defaults for; the shapes say the vocabulary for sure
    embed = next((k for k in state if k.endswith("embed_tokens.weight")), "")
    text = {"hidden_size": 4096, **text, "vocab_size": size(state, embed)}
    found = _sizes(text, vision, single(config.get("vision_feature_layer", -2)), config.get("image_token_id", config.get("image_token_index", 32000)))
    return "paper", found | _plain(hf_feed(config, single(vision["image_size"])))


def _plain(feed: Dict) -> Dict:
    """Without the random view of training, which these presets have not."""
    return {k: v for k, v in feed.items() if not k.startswith("feed.train_image")}


def _sizes(text: Dict, vision: Dict, layer: int, place: int) -> Dict:
    at, width = "config.vision.tower", vision["hidden_size"]
    return {
        **llama_hf.sizes(text, "config.language"), "config.vision.layer": layer,
        f"{at}.image_size": single(vision["image_size"]), f"{at}.patch": single(vision["patch_size"]), f"{at}.norm_pre.eps": vision["layer_norm_eps"],
        **body(f"{at}.body", width=width, depth=vision["num_hidden_layers"], heads=vision["num_attention_heads"],
               hidden=vision["intermediate_size"], act=vision["hidden_act"], eps=vision["layer_norm_eps"]),
        "config.connector.into": width, "config.connector.out": text["hidden_size"],
        "config.image_token": place, "feed.text.image": place, "feed.text.vocab": place}


def read_official(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the authors' `config.json`, a LLaMA's with the name of the tower in it.

    Their released files leave CLIP's own weights out; ours, written with `write_official`, hold them and say their sizes.
    """
    if not config:
        raise UserError("config.json is missing", "put it beside the weights")
    vision = {**VISION_DEFAULTS, "image_size": 336 if "336" in str(config.get("mm_vision_tower", "")) else 224, **within(config, "mm_vision_config")}
    text = {**config, "vocab_size": size(state, "model.embed_tokens.weight"), "rope_scaling": None}
    found = _sizes(text, vision, single(config.get("mm_vision_select_layer", -2)), config.get("image_token_index", size(state, "lm_head.weight") - 1))
    return "paper", found | _plain(image_feed(single(vision["image_size"])))


def write_official(config: Any) -> Dict:
    """The authors' `config.json`."""
    tower, name = _vision(config), "openai/clip-vit-large-patch14"
    plain = not hasattr(config.connector, "act")
    return {**llama_hf.write(config.language), "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "use_mm_proj": True,
            "mm_vision_tower": name if config.vision.tower.image_size == 224 else f"{name}-336", "mm_vision_config": tower,
            "mm_hidden_size": tower["hidden_size"], "mm_vision_select_layer": config.vision.layer, "mm_vision_select_feature": "patch",
            "mm_projector_type": "linear" if plain else "mlp2x_gelu", "image_token_index": config.image_token}


def _vision(config: Any) -> Dict:
    """transformers' configuration of CLIP's ViT inside a PatchTokens. Raises UserError for another eye."""
    tower = getattr(config.vision, "tower", None)
    if tower is None or getattr(tower, "norm_pre", None) is None or config.vision.layer is None:
        raise UserError("published LLaVAs have CLIP's ViT for their eye", "keep the run folder")
    of = body_of(tower.body, "hf")
    return {"model_type": "clip_vision_model", "hidden_size": of["width"], "intermediate_size": of["hidden"], "num_hidden_layers": of["depth"],
            "num_attention_heads": of["heads"], "hidden_act": act_name(of["act"], "hf"), "layer_norm_eps": of["eps"],
            "image_size": tower.image_size, "patch_size": tower.patch}


def write(config: Any) -> Dict:
    """`config.json` of a LlavaForConditionalGeneration. Raises UserError for parts that it cannot hold."""
    vision, connector = _vision(config), config.connector
    if getattr(connector, "act", "") != "gelu":
        raise UserError("transformers' LLaVA has a connector of two layers and GELU", "LLaVA's linear one has only the authors' layout (official)")
    return {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "dtype": "float32",
            "image_token_index": config.image_token, "projector_hidden_act": act_name(connector.act, "hf"),
            "vision_feature_layer": config.vision.layer, "vision_feature_select_strategy": "default",
            "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2, "tie_word_embeddings": False,
            "text_config": llama_hf.write(config.language), "vision_config": vision}


def to_feed(feed: Feed) -> Dict:
    return to_hf_feed(feed, "CLIPImageProcessor")


LAYOUT = Layout(of="llava_1_5", name="hf", keymap=keymap, read=read, write=write, feed=to_feed, beside=("preprocessor_config.json",))
OFFICIAL, OFFICIAL_1_5 = (Layout(of=of, name="official", keymap=official, read=read_official, write=write_official) for of in ("llava", "llava_1_5"))
