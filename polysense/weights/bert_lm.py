"""BERT and RoBERTa as transformers publishes them with or without their heads: BertForPreTraining, BertForMaskedLM, BertModel and RoBERTa's alike."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.weights import bert_hf
from polysense.weights.keymap import KeyMap, Rule, State, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, size, within

HEADS = {"bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
         "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")}
ALIAS = (("{rest}LayerNorm.gamma", "{rest}LayerNorm.weight"), ("{rest}LayerNorm.beta", "{rest}LayerNorm.bias"))      # the names of 2018


def _table(of: str, config: Any) -> KeyMap:
    dense, norm, bias = HEADS[of]
    tower = KeyMap(bert_hf.TEXT.rules, drop=(r"embeddings\.position_ids",)).at(of, "text")
    rules: tuple[Rule, ...] = both(f"{of}.pooler.dense", "text.pooler.pre") if config.text.pooler is not None else ()
    drop = () if config.text.pooler is not None else (rf"{of}\.pooler\..*",)
    if config.predict is not None:
        rules += (*both(dense, "predict.pre"), *both(norm, "predict.norm"), rule(bias, "predict.bias"))
        drop += (rf"{dense.split('.')[0]}\.(predictions\.)?decoder\.(weight|bias)",)             # copies of the embedding and of the bias
    rules += both("cls.seq_relationship", "follows") if config.follows is not None else ()
    parts = "embeddings", "encoder", "pooler"
    return tower + KeyMap(rules, drop, (*((f"{p}.{{rest}}", f"{of}.{p}.{{rest}}") for p in parts), *ALIAS))


def _ids(of: str, config: Dict, vocab: int, pad: int) -> Dict:
    """Overrides of `hide`: the ids of [MASK] and of the special tokens, as tokenizer.json beside the weights has them, else the published ones."""
    beside = within(config, "tokenizer")
    known: Dict = dict(within(within(beside, "model"), "vocab")) | {t["content"]: t["id"] for t in beside.get("added_tokens", ())}
    names, usual = (("[MASK]", "[CLS]", "[SEP]"), (103, 101, 102)) if of == "bert" else (("<mask>", "<s>", "</s>"), (vocab - 1, 0, 2))
    mask, start, end = (min(int(known.get(n, u)), vocab - 1) for n, u in zip(names, usual, strict=True))
    return {"config.hide.mask": mask, "config.hide.special": (pad, start, end)}


def _layout(of: str, name: str, preset: str) -> Layout:
    dense, _, bias = HEADS[of]

    def read(config: Dict, state: State) -> tuple[str, Dict]:
        """(preset, overrides): sizes from the configuration, heads from what the file holds."""
        kind = config.get("model_type", of)
        if kind != of:
            raise UserError(f"this file says that it is a {kind}", "say layout=roberta" if kind == "roberta" else "say layout=hf for BERT")
        out = bert_hf.sizes({"layer_norm_eps": 1e-5, "pad_token_id": 1, "type_vocab_size": 1, **config} if of == "roberta" else config, "config.text")
        words = next((k for k in state if k.endswith("embeddings.word_embeddings.weight")), "embeddings.word_embeddings.weight")
        vocab, width = size(state, words), size(state, words, 1)
        out |= {"config.text.vocab": vocab, "config.hide.vocab": vocab, "feed.text.vocab": vocab, **_ids(of, config, vocab, out["config.text.pad"])}
        if of == "roberta":                              # the table has rows before the first position
            out["config.text.length"] -= out["config.text.pad"] + 1
        out["feed.text.length"] = out["config.text.length"]
        pooled = any(k.startswith(("pooler.", f"{of}.pooler.")) for k in state)
        norm = {"is": "polysense.nn.norm:LayerNorm.Config", "eps": out["config.text.norm_pre.eps"]}
        out["config.text.pooler"] = from_dict({"is": "polysense.nn.head:TanhHead.Config", "into": width, "hidden": width}) if pooled else None
        out["config.predict"] = from_dict({"is": "polysense.decoders.words:WordHead.Config", "width": width, "vocab": vocab, "norm": norm,
                                           "act": out["config.text.body.block.mlp.act"]}) if bias in state or f"{dense}.weight" in state else None
        out["config.follows"] = from_dict({"is": "polysense.nn.head:LinearBias.Config", "into": width, "out": 2}) \
            if "cls.seq_relationship.weight" in state else None
        return preset, out

    def write(config: Any) -> Dict:
        """`config.json` of the model that has just these heads."""
        first, what = ("Bert", config.follows) if of == "bert" else ("Roberta", None)
        counted = config.text.owner.__name__ == "Roberta"
        if counted != (of == "roberta") or (config.follows is not None and of == "roberta"):
            raise UserError(f"this is {'RoBERTa' if counted else 'BERT'}, which the layout {name!r} is not for", "use the other layout")
        if config.follows is not None and (config.predict is None or config.text.pooler is None):
            raise UserError("transformers has no BERT with a head for the next sentence alone", "keep the run folder")
        if config.predict is not None and (config.predict.act, config.predict.norm.eps) != (config.text.body.block.mlp.act, config.text.norm_pre.eps):
            raise UserError("transformers' head has the activation and the eps of the blocks", "keep the run folder")
        out = bert_hf.write(config.text)
        kind = "ForPreTraining" if what is not None else "ForMaskedLM" if config.predict is not None else "Model"
        more: Dict = {"bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": config.text.length + config.text.pad + 1} if counted else {}
        return out | {"architectures": [first + kind], "model_type": of, "hidden_dropout_prob": config.text.dropout,
                      "attention_probs_dropout_prob": config.text.body.block.attn.dropout} | more

    return Layout(of="bert", name=name, keymap=lambda config: _table(of, config), read=read, write=write, beside=("tokenizer.json",))


LAYOUT, ROBERTA = _layout("bert", "hf", "paper"), _layout("roberta", "roberta", "roberta")
