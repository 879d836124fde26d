"""ALBEF through the released file and back. The reference is put together from transformers' BERT with cross-attention (BlipTextModel is the
released one, renamed) and timm's ViT: random weights, toy sizes, tolerance 1e-4."""
import json

import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.fuse import albef
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_
from polysense.weights.files import read_state

VOCAB, WIDTH, DIM, FIRST, DEPTH, LAYOUT = 120, 64, 16, 2, 4, albef.weights["albef"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(modules, state under the released names, folder)"""
    torch.manual_seed(0)
    timm, hf = reference("timm"), reference("transformers")
    from transformers.models.blip.modeling_blip_text import BlipTextLayer
    vision = shake(timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=0))
    bert = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 12,
            "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0}
    masked = shake(hf.BertForMaskedLM(hf.BertConfig(num_hidden_layers=FIRST, attn_implementation="eager", **bert)))
    blip = hf.BlipTextConfig(encoder_hidden_size=64, num_hidden_layers=DEPTH - FIRST, is_decoder=True, attn_implementation="eager", **bert)
    fusion = [shake(BlipTextLayer(blip, i)) for i in range(DEPTH - FIRST)]
    heads = {n: shake(torch.nn.Linear(i, o)) for n, i, o in (("vision_proj", 64, DIM), ("text_proj", WIDTH, DIM), ("itm_head", WIDTH, 2))}
    state = {}
    for twin in ("", "_m"):
        state |= {f"visual_encoder{twin}.{k}": v for k, v in vision.state_dict().items()}
        state |= {f"text_encoder{twin}.{k}": v for k, v in masked.state_dict().items()}
        state[f"text_encoder{twin}.bert.embeddings.position_ids"] = torch.arange(12)[None]
        for i, layer in enumerate(fusion):
            state |= {f"text_encoder{twin}.bert.encoder.layer.{FIRST + i}.{k}": v for k, v in layer.state_dict().items()}
        state |= {f"{n}{twin}.{k}": v for n, m in heads.items() if n != "itm_head" for k, v in m.state_dict().items()}
    state |= {f"itm_head.{k}": v for k, v in heads["itm_head"].state_dict().items()}
    state |= {n: F.normalize(torch.randn(DIM, 6), dim=0) for n in ("image_queue", "text_queue")}
    state |= {"temp": torch.tensor(0.05), "queue_ptr": torch.tensor([4])}
    folder = tmp_path_factory.mktemp("albef")
    torch.save({"model": {k: v.clone() for k, v in state.items()}, "epoch": 29}, folder / "ALBEF.pth")
    (folder / "config_bert.json").write_text(json.dumps(bert))
    return (vision, masked, fusion, heads), state, folder


@torch.no_grad()
def want(modules, image, text):
    vision, masked, fusion, heads = modules
    mask = (text != 0).long()
    wide = (1.0 - mask[:, None, None].float()) * -1e9
    seen, said = vision.forward_features(image), masked.bert(text, attention_mask=mask).last_hidden_state
    x = said
    for layer in fusion:
        out = layer(x, attention_mask=wide, encoder_hidden_states=seen)
        x = out[0] if isinstance(out, tuple) else out
    return {"image": F.normalize(heads["vision_proj"](seen[:, 0]), dim=-1), "text": F.normalize(heads["text_proj"](said[:, 0]), dim=-1),
            "match": heads["itm_head"](x[:, 0]), "words": masked.cls(x)}


@torch.no_grad()
def got(system, image, text):
    said, seen = system.text(text), system.vision(image).tokens
    return {"image": system.encode_image(image), "text": system.encode_text(text), "match": system.match_logits(seen, said),
            "words": system.guess(system.whole, seen, text, text >= 0).unflatten(0, text.shape)}


def inputs():
    text = torch.randint(5, VOCAB, (3, 9))
    text[:, 0], text[0, 6:], text[1, 8] = 1, 0, 2
    return torch.randn(3, 3, 32, 32), text


def test_released_file_in_and_out(theirs, tmp_path):
    modules, state, folder = theirs
    ours, preset = import_(folder, LAYOUT, lambda n: preset_of("albef", n))
    assert preset.config.text.body.depth == FIRST and preset.config.fusion.depth == DEPTH - FIRST and preset.feed.image.size == 32
    image, text = inputs()
    assert_agree(got(ours, image, text), want(modules, image, text))
    assert ours.image_queue.pointer == 4 == ours.text_queue.pointer and float(ours.ramp) == 1 and ours.temperature.item() == pytest.approx(0.05)
    torch.testing.assert_close(ours.text_queue.keys, state["text_queue"].T)
    with torch.no_grad():
        words = ours.guess(ours.teacher.module, ours.vision(image).tokens, text, text >= 0).unflatten(0, text.shape)
    assert_agree({"words": words}, {"words": want(modules, image, text)["words"]})

    export(ours.state_dict(), preset.config, LAYOUT, tmp_path / "back", preset.feed)
    back = read_state(tmp_path / "back" / "ALBEF.pth")
    assert set(back) == {k for k in state if not k.endswith("position_ids")}
    for name, value in back.items():
        torch.testing.assert_close(value, state[name].reshape(value.shape), rtol=0, atol=0)
    assert json.loads((tmp_path / "back" / "config_bert.json").read_text())["fusion_layer"] == FIRST


def test_a_retrieval_model_has_one_more_queue(theirs, tmp_path):
    _, state, _ = theirs
    torch.save({**state, "idx_queue": torch.zeros(1, 6)}, tmp_path / "flickr30k.pth")
    ours, _ = import_(tmp_path, LAYOUT, lambda n: preset_of("albef", n))
    torch.testing.assert_close(ours.image_head.weight, state["vision_proj.weight"], rtol=0, atol=0)
    torch.testing.assert_close(ours.image_queue.keys, state["image_queue"].T, rtol=0, atol=0)


@pytest.mark.parametrize("break_, says", [
    (lambda s: s.pop("vision_proj.weight"), "lacks"),
    (lambda s: s.pop("text_encoder.cls.predictions.bias"), "missing"),
    (lambda s: s.update(extra=torch.zeros(2)), "extra"),
    (lambda s: s.update({"text_encoder.cls.predictions.decoder.weight": torch.zeros(VOCAB, WIDTH)}), "copies differ")])
def test_damaged_files_are_refused_by_name(theirs, tmp_path, break_, says):
    _, state, _ = theirs
    state = dict(state)
    break_(state)
    torch.save(state, tmp_path / "ALBEF.pth")
    with pytest.raises(UserError, match=says):
        import_(tmp_path, LAYOUT, lambda n: preset_of("albef", n))


def test_towers_without_released_names_are_refused():
    with pytest.raises(UserError, match="plain ViT"):
        LAYOUT.write(preset_of("albef", "captions").config)
    with pytest.raises(UserError, match="no answer decoder"):
        LAYOUT.keymap(preset_of("albef").config)
