"""ALBEF fine-tuned for questions as released (salesforce/ALBEF): `vqa.pth`, beside it `config_bert.json`.

Its BERT stands without a word predictor; behind it a decoder of six layers, all with cross-attention, writes the answer. The momentum copy of
towers and fusion encoder is read where the file has it, that of the decoder is not (ours answers without). Nothing in the file searches or
matches: those heads are absent, and say so.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.weights.albef import layer, towers
from polysense.weights.albef import write as write_whole
from polysense.weights.keymap import KeyMap, Rule, State, both, lead1, rule, tied
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body, count, size
from polysense.weights.vit_timm import VISION

ABSENT = {"is": "polysense.nn.head:Absent.Config", "says": "answers questions"}
GONE = ("image_head", "text_head", "match_head", "words")


def embeddings(theirs: str, ours: str, tie: str = "") -> tuple[Rule, ...]:
    """Words, places and kinds of a BERT with the norm behind; `tie`: their second name of the words."""
    words = f"{theirs}.word_embeddings.weight"
    return (rule((words, tie), f"{ours}.embed.weight", tied) if tie else rule(words, f"{ours}.embed.weight"),
            rule(f"{theirs}.position_embeddings.weight", f"{ours}.position", lead1),
            rule(f"{theirs}.token_type_embeddings.weight", f"{ours}.kind.weight"), *both(f"{theirs}.LayerNorm", f"{ours}.norm_pre"))


def network(config: Any, twin: str, ours: str) -> KeyMap:
    """Towers and fusion encoder, or (twin="_m") their momentum copy."""
    at, first = f"text_encoder{twin}", config.text.body.depth
    return VISION.at(f"visual_encoder{twin}", f"{ours}vision") + KeyMap((
        *embeddings(f"{at}.embeddings", f"{ours}text"),
        *(r for i in range(first) for r in layer(f"{at}.encoder.layer.{i}", f"{ours}text.body.blocks.{i}", "")),
        *(r for i in range(config.fusion.depth) for r in layer(f"{at}.encoder.layer.{first + i}", f"{ours}fusion.blocks.{i}")),
    ), drop=(rf"{at}\.embeddings\.position_ids",))


def keymap(config: Any) -> KeyMap:
    """Of a model that answers and does nothing else. Its queues, temperature and ramp are its own."""
    if config.answer is None or any(getattr(config, n).owner.__name__ != "Absent" for n in GONE):
        raise UserError("the released file of the question model has an answer decoder, and no heads for search, matching or guessing words",
                        "export the preset paper to the layout albef, or keep the run folder")
    at, ours, head = "text_decoder.bert", "answer.text", "text_decoder.cls.predictions"
    decoder = KeyMap((
        *embeddings(f"{at}.embeddings", ours, f"{head}.decoder.weight"),
        *(r for i in range(config.answer.text.body.depth) for r in layer(f"{at}.encoder.layer.{i}", f"{ours}.body.blocks.{i}")),
        *both(f"{head}.transform.dense", "answer.words.pre"), *both(f"{head}.transform.LayerNorm", "answer.words.norm"),
        rule((f"{head}.bias", f"{head}.decoder.bias"), "answer.words.bias", tied)),
        drop=(r"text_decoder\.bert\.embeddings\.position_ids", r"text_decoder_m\..*"), own=(
            r"teacher\..*", "temperature", "ramp", r"(image|text)_queue\..*"))
    return network(config, "", "") + network(config, "_m", "teacher.module.") + decoder


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides): as of the pre-trained model, with an answer decoder of as many layers as there are."""
    out = towers(config, state, "text_encoder")
    at = "text_decoder.bert"
    vocab, act, eps = size(state, f"{at}.embeddings.word_embeddings.weight"), config.get("hidden_act", "gelu"), config.get("layer_norm_eps", 1e-12)
    wide = out["config.text.body.width"]
    part = body("config.answer.text.body", width=wide, depth=count(state, f"{at}.encoder.layer"), heads=out["config.text.body.heads"],
                hidden=size(state, f"{at}.encoder.layer.0.intermediate.dense.weight"), act=act, eps=eps, final=False)
    return "paper_vqa", out | part | {
        **{f"config.{n}": from_dict(ABSENT) for n in GONE}, "config.answer.text.vocab": vocab, "config.answer.text.body.block.cross.source": wide,
        "config.answer.text.length": size(state, f"{at}.embeddings.position_embeddings.weight"), "config.answer.text.norm_pre.eps": eps,
        "config.answer.text.pad": config.get("pad_token_id", 0),
        "config.answer.text.kinds": size(state, f"{at}.embeddings.token_type_embeddings.weight"),
        "config.answer.words.vocab": vocab, "config.answer.words.act": act, "config.answer.words.norm.eps": eps}


def write(config: Any) -> Dict:
    """`config_bert.json`."""
    keymap(config)
    return write_whole(config)


LAYOUT = Layout(of="albef", name="vqa", keymap=keymap, read=read, write=write, config_file="config_bert.json", weights_file="vqa.pth")
