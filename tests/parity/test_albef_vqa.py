"""ALBEF's question model through the released file and back: timm's ViT and transformers' BERT layers (BlipTextModel is the released one,
renamed), put together. Random weights, toy sizes, tolerance 1e-4."""
import json

import pytest
import torch
from reference import reference, shake

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.fuse import albef
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_
from polysense.weights.files import read_state

VOCAB, WIDTH, FIRST, DEPTH, SAYS, LAYOUT = 120, 64, 2, 4, 3, albef.weights["vqa"]
BERT = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 12,
        "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(modules, state under the released names, folder)"""
    torch.manual_seed(0)
    timm, hf = reference("timm"), reference("transformers")
    from transformers.models.bert.modeling_bert import BertEmbeddings, BertLMPredictionHead
    from transformers.models.blip.modeling_blip_text import BlipTextLayer
    vision = shake(timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=0))
    text = shake(hf.BertModel(hf.BertConfig(num_hidden_layers=FIRST, attn_implementation="eager", **BERT), add_pooling_layer=False))
    blip = hf.BlipTextConfig(encoder_hidden_size=64, is_decoder=True, attn_implementation="eager", **BERT)
    fusion, decoder = ([shake(BlipTextLayer(blip, i)) for i in range(n)] for n in (DEPTH - FIRST, SAYS))
    words, head = shake(BertEmbeddings(hf.BertConfig(**BERT))), shake(BertLMPredictionHead(hf.BertConfig(**BERT)))
    head.decoder.weight = words.word_embeddings.weight
    state = {}
    for twin in ("", "_m"):
        state |= {f"visual_encoder{twin}.{k}": v for k, v in vision.state_dict().items()}
        state |= {f"text_encoder{twin}.{k}": v for k, v in text.state_dict().items()}
        for i, layer in enumerate(fusion):
            state |= {f"text_encoder{twin}.encoder.layer.{FIRST + i}.{k}": v for k, v in layer.state_dict().items()}
        state |= {f"text_decoder{twin}.bert.embeddings.{k}": v for k, v in words.state_dict().items() if not k.endswith("ids")}
        for i, layer in enumerate(decoder):
            state |= {f"text_decoder{twin}.bert.encoder.layer.{i}.{k}": v for k, v in layer.state_dict().items()}
        state |= {f"text_decoder{twin}.cls.predictions.{k}": v for k, v in head.state_dict().items()}
        state[f"text_decoder{twin}.cls.predictions.bias"] = head.decoder.bias.data
        state[f"text_decoder{twin}.bert.embeddings.position_ids"] = torch.arange(12)[None]
    state = {k: v for k, v in state.items() if not k.endswith("token_type_ids")}
    folder = tmp_path_factory.mktemp("vqa")
    torch.save({"model": {k: v.clone() for k, v in state.items()}, "epoch": 7}, folder / "vqa.pth")
    (folder / "config_bert.json").write_text(json.dumps(BERT))
    return (vision, text, fusion, words, decoder, head), state, folder


def added(mask):
    return (1.0 - mask.float()) * -1e9


def through(layers, x, mask, source, source_mask):
    """Half by half: BlipTextLayer itself drops the mask of its source."""
    for layer in layers:
        x = layer.attention(x, attention_mask=mask)[0]
        self_attention = layer.crossattention.self(x, encoder_hidden_states=source, encoder_attention_mask=source_mask)[0]
        x = layer.feed_forward_chunk(layer.crossattention.output(self_attention, x))
    return x


@torch.no_grad()
def want(modules, image, question, answer):
    vision, text, fusion, words, decoder, head = modules
    real = (question != 0).long()
    fused = through(fusion, text(question, attention_mask=real).last_hidden_state, added(real[:, None, None]), vision.forward_features(image), None)
    length = answer.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & (answer != 0)[:, None, None]
    said = through(decoder, words(answer), added(causal), fused, added(real[:, None, None]))
    return {"fused": fused[real.bool()], "logits": head(said)[answer != 0]}


@torch.no_grad()
def got(system, image, question, answer):
    source, mask = system.read_question(image, question)
    return {"fused": source[mask], "logits": system.decoder(answer, source, mask)[answer != 0]}


def inputs():
    question, answer = torch.randint(5, VOCAB, (3, 9)), torch.randint(5, VOCAB, (3, 5))
    question[:, 0], question[0, 6:], answer[:, 0], answer[1, 4] = 1, 0, 1, 0
    return torch.randn(3, 3, 32, 32), question, answer


def opened(place):
    return import_(place, LAYOUT, lambda n: preset_of("albef", n))


def test_released_file_in_and_out(theirs, tmp_path):
    modules, state, folder = theirs
    ours, preset = opened(folder)
    batch = inputs()
    assert_agree(got(ours, *batch), want(modules, *batch))
    assert preset.config.answer.text.body.depth == SAYS and preset.config.fusion.depth == DEPTH - FIRST
    torch.testing.assert_close(ours.teacher.module["vision"].patch.weight, ours.vision.patch.weight, rtol=0, atol=0)
    before = ours.answer.words.bias.clone()
    ours.after_start()
    assert torch.equal(ours.answer.words.bias, before), "a trained decoder is not made a copy of the fusion encoder again"

    export(ours.state_dict(), preset.config, LAYOUT, tmp_path / "back", preset.feed)
    back = read_state(tmp_path / "back" / "vqa.pth")
    assert set(back) == {k for k in state if not k.endswith("position_ids") and not k.startswith("text_decoder_m")}
    for name, value in back.items():
        torch.testing.assert_close(value, state[name].reshape(value.shape), rtol=0, atol=0)


def test_a_file_without_the_momentum_copy_is_read_and_answers(theirs, tmp_path):
    _, state, folder = theirs
    torch.save({k: v for k, v in state.items() if "_m." not in k}, tmp_path / "vqa.pth")
    (tmp_path / "config_bert.json").write_bytes((folder / "config_bert.json").read_bytes())
    ours, _ = opened(tmp_path)
    image, question, answer = inputs()
    assert ours.generate_text(image, question, max_new=3).shape[0] == 3
    ranked = ours.rank_answers(image, question, answer)
    assert ranked.shape == (3, 3) and ranked.isfinite().all()


def test_what_the_file_has_no_head_for_says_so(theirs):
    ours, _ = opened(theirs[2])
    image, question, _ = inputs()
    for call in (lambda: ours.encode_image(image), lambda: ours.encode_text(question), lambda: ours.match_text(image, question),
                 lambda: ours.pretrain({"image": image, "text": question})):
        with pytest.raises(UserError, match="only answers questions"):
            call()


@pytest.mark.parametrize("break_, says", [
    (lambda s: s.pop("text_decoder.cls.predictions.bias"), "missing"), (lambda s: s.update(extra=torch.zeros(2)), "extra"),
    (lambda s: [s.pop(k) for k in list(s) if ".patch_embed.proj.bias" in k], "lacks vision.patch.bias")])
def test_damaged_files_are_refused_by_name(theirs, tmp_path, break_, says):
    state = dict(theirs[1])
    break_(state)
    torch.save(state, tmp_path / "vqa.pth")
    with pytest.raises(UserError, match=says):
        opened(tmp_path)


def test_the_pretraining_model_is_no_question_model():
    with pytest.raises(UserError, match="answer decoder"):
        LAYOUT.keymap(preset_of("albef", "paper").config)
