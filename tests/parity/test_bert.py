"""BERT and RoBERTa through transformers' files and back. Random weights, toy sizes, tolerance 1e-4."""
import json

import pytest
import torch
from reference import reference, shake
from safetensors.torch import load_file, save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.data.tokenizer import load_tokenizer
from polysense.systems.backbone import bert
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

TOY = {"vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 24}


def theirs(kind: str):
    hf = reference("transformers")
    torch.manual_seed(0)
    config = (hf.BertConfig if kind.startswith("Bert") else hf.RobertaConfig)(**TOY, **({} if kind.startswith("Bert") else {"type_vocab_size": 1}))
    model = shake(getattr(hf, kind)(config))
    model.tie_weights()
    return hf, model


def sample(pad: int):
    text = torch.randint(3, 70, (3, 14), generator=torch.Generator().manual_seed(1))
    text[1, 9:], text[2, 5:] = pad, pad
    return text, (text != pad), (torch.arange(14) > 4).long().expand(3, -1) * (text != pad)


@pytest.mark.parametrize("kind", ["BertForPreTraining", "BertForMaskedLM", "BertModel", "RobertaForMaskedLM", "RobertaModel"])
@torch.no_grad()
def test_transformers_in_and_out(tmp_path, kind):
    hf, model = theirs(kind)
    model.save_pretrained(tmp_path / "theirs")
    of_bert = kind.startswith("Bert")
    layout = bert.weights["hf" if of_bert else "roberta"]
    ours, preset = import_(tmp_path / "theirs", layout, lambda name: preset_of("bert", name))
    text, real, kinds = sample(0 if of_bert else 1)
    given = {"attention_mask": real, **({"token_type_ids": kinds} if of_bert else {})}
    out = model(text, output_hidden_states=True, **given)
    seen = ours.text(text, kind=kinds if of_bert else None)
    assert preset.config.text.length == (24 if of_bert else 22)
    want = {"hidden": out.hidden_states[-1][real]}
    got = {"hidden": seen.tokens[real]}
    for i in (1, 2):                                                      # between the blocks too
        x = ours.text.norm_pre(ours.text.embed(text) + ours.text.places(text, 0) + ours.text.kind(kinds if of_bert else kinds * 0))
        got[f"layer {i}"] = ours.text.body.layers(x, mask=real, stop=i)[-1][real]
        want[f"layer {i}"] = out.hidden_states[i][real]
    if kind.endswith("Model"):
        want["pooler"], got["pooler"] = out.pooler_output, seen.pooled
        assert ours.predict is None
    else:
        want["words"] = (out.prediction_logits if kind == "BertForPreTraining" else out.logits)[real]
        got["words"] = ours.guess(seen, real)
    chosen = real & (torch.arange(14) % 4 == 2)
    label = text.masked_fill(~chosen, -100)
    if kind == "BertForPreTraining":
        want["next"], got["next"] = out.seq_relationship_logits, ours.follows(seen.pooled)
        follows = torch.tensor([1, 0, 1])
        want["loss"] = model(text, labels=label, next_sentence_label=1 - follows, **given).loss
        ours.hide = Told(text, chosen)
        got["loss"] = ours.losses({"text": text, "segment": kinds, "follows": follows}).total()
    elif not kind.endswith("Model"):
        want["loss"] = model(text, labels=label, **given).loss
        if of_bert:                                                       # `masked` has no segments
            want["loss"] = model(text, labels=label, attention_mask=real).loss
        ours.hide = Told(text, chosen)
        got["loss"] = ours.masked({"text": text})["words"]
    assert_agree(got, want)
    export(ours.state_dict(), preset.config, layout, tmp_path / "back", preset.feed)
    again = getattr(hf, kind).from_pretrained(tmp_path / "back").eval()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == [kind]
    assert_agree({"hidden": again(text, output_hidden_states=True, **given).hidden_states[-1][real]}, {"hidden": want["hidden"]})
    in_memory = model.state_dict()                                        # names in memory, copies of tied weights included
    assert {k: v.shape for k, v in layout.keymap(preset.config).load(in_memory).items()} == {k: v.shape for k, v in ours.state_dict().items()}


class Told(torch.nn.Module):
    """Stands where words are hidden: the same words in both libraries, nothing replaced."""

    def __init__(self, text, chosen):
        super().__init__()
        self.text, self.chosen, self.mask = text, chosen, 4

    def forward(self, text):
        return text, self.chosen


@torch.no_grad()
def test_names_of_2018(tmp_path):
    _, model = theirs("BertForPreTraining")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in state.items()}
    old |= {"bert.embeddings.position_ids": torch.arange(24)[None],
            "cls.predictions.decoder.weight": state["bert.embeddings.word_embeddings.weight"].clone()}
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, _ = import_(tmp_path, bert.weights["hf"], lambda name: preset_of("bert", name))
    text, real, kinds = sample(0)
    want = model(text, attention_mask=real, token_type_ids=kinds).prediction_logits[real]
    assert_agree({"words": ours.guess(ours.text(text, kind=kinds), real)}, {"words": want})


@pytest.mark.parametrize("preset, layout, name, size", [
    ("paper", "hf", "BertForPreTraining", {"vocab_size": 30522}), ("large", "hf", "BertForPreTraining", {
        "vocab_size": 30522, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}),
    ("roberta", "roberta", "RobertaForMaskedLM", {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
                                                 "layer_norm_eps": 1e-5})])
def test_published_shapes(preset, layout, name, size):
    hf = reference("transformers")
    config = (hf.BertConfig if layout == "hf" else hf.RobertaConfig)(**size)
    plan = preset_of("bert", preset)
    with torch.device("meta"):
        state, ours = getattr(hf, name)(config).state_dict(), plan.config.build().state_dict()
    table = bert.weights[layout]
    assert {k: v.shape for k, v in table.keymap(plan.config).load(state).items()} == {k: v.shape for k, v in ours.items()}
    sized = preset_of("bert", "paper" if layout == "hf" else "roberta").but(**table.read(config.to_dict(), state)[1])
    with torch.device("meta"):
        assert {k: v.shape for k, v in sized.config.build().state_dict().items()} == {k: v.shape for k, v in ours.items()}


def test_the_wrong_layout_is_named(tmp_path):
    _, model = theirs("RobertaModel")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="roberta"):
        import_(tmp_path, bert.weights["hf"], lambda name: preset_of("bert", name))
    with pytest.raises(UserError, match="other layout"):
        bert.weights["roberta"].write(preset_of("bert").config)
    with pytest.raises(UserError, match="other layout"):
        bert.weights["hf"].write(preset_of("bert", "roberta").config)


def test_byte_level_bpe_as_robertas_own(tmp_path):
    hf = reference("transformers")
    from tokenizers import ByteLevelBPETokenizer

    engine = ByteLevelBPETokenizer()
    lines = ["A dog runs, quickly!", "two dogs ran over the Hill", "naïve café 東京 🙂", "the cat's whiskers"]
    engine.train_from_iterator(lines * 5, vocab_size=330, min_frequency=1, show_progress=False,
                               special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    engine.save_model(str(tmp_path))
    fast = hf.RobertaTokenizerFast(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    fast.save_pretrained(tmp_path / "published")
    plan = preset_of("bert", "roberta").but(**{"feed.text.length": 20}).feed.text
    ours = load_tokenizer(tmp_path / "published", plan)
    said = [*lines, "unseen Words 12"]
    ids = ours(said)
    want = fast(said, padding=True, truncation=True, max_length=20, return_tensors="pt").input_ids
    assert torch.equal(ids, want) and (ours.pad, ours.start, ours.end) == (1, 0, 2)
    assert [ours.decode(row) for row in ours(lines)] == lines
