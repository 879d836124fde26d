"""BLIP-2's first stage through LAVIS's file and back: transformers' matching model and word predictor under the released names. Toy sizes, 1e-4."""
import re

import pytest
import torch
from reference import reference, shake

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.lmm import blip2
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_
from polysense.weights.files import read_state

LAYOUT, WIDE, WIDTH, VOCAB = blip2.weights["lavis"], 176, 128, 40
RENAME = ((r"\.attention\.attention\.", ".attention.self."), (r"crossattention\.attention\.", "crossattention.self."))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(model, word predictor, state under the released names, folder)"""
    hf = reference("transformers")
    from transformers.models.bert.modeling_bert import BertLMPredictionHead
    torch.manual_seed(0)
    vision = {"hidden_size": WIDE, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 28, "patch_size": 14,
              "layer_norm_eps": 1e-6}
    qformer = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40,
               "encoder_hidden_size": WIDE, "max_position_embeddings": 12, "pad_token_id": 0, "use_qformer_text_input": True}
    model = shake(hf.Blip2ForImageTextRetrieval(hf.Blip2Config(vision_config=vision, qformer_config=qformer, text_config={"model_type": "opt"},
                                                               num_query_tokens=5, image_text_hidden_size=10)))
    head = shake(BertLMPredictionHead(hf.BertConfig(vocab_size=VOCAB, hidden_size=WIDTH, layer_norm_eps=1e-12)))
    model.vision_model.post_layernorm.eps = 1e-5                                            # LAVIS's ln_vision
    state = {}
    for block in model.vision_model.encoder.layers:
        block.self_attn.qkv.bias.data[WIDE:2 * WIDE] = 0                                    # EVA has no bias of keys
    for name, value in model.state_dict().items():
        name = re.sub(r"vision_model\.encoder\.layers\.(\d+)\.", r"visual_encoder.blocks.\1.", name)
        for a, b in (("self_attn.qkv", "attn.qkv"), ("self_attn.projection", "attn.proj"), ("layer_norm", "norm"), *RENAME,
                     ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"), ("vision_model.post_layernorm", "ln_vision"),
                     ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"), ("vision_projection", "vision_proj"),
                     ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"), ("text_projection", "text_proj"),
                     ("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm"), ("qformer.encoder", "Qformer.bert.encoder")):
            name = re.sub(a, b, name) if "\\" in a else name.replace(a, b)
        name = "Qformer.bert." + name if name.startswith("embeddings.") else name
        if name.endswith("qkv.bias"):
            q, _, v = value.chunk(3)
            state |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            state[name] = value
    words = "Qformer.bert.embeddings.word_embeddings.weight"
    head.decoder.weight.data = state[words]
    state |= {f"Qformer.cls.predictions.{k}": v for k, v in head.state_dict().items()}
    state["Qformer.cls.predictions.decoder.bias"] = state["Qformer.cls.predictions.bias"] = head.decoder.bias.data
    state |= {"temp": torch.tensor(0.05), "Qformer.bert.embeddings.position_ids": torch.arange(12)[None]}
    folder = tmp_path_factory.mktemp("lavis")
    torch.save({"model": {k: v.clone() for k, v in state.items()}}, folder / "blip2_pretrained.pth")
    return model, head, state, folder


@torch.no_grad()
def want(model, head, image, text, hidden):
    mask = (text != 0).long()
    itc = model(pixel_values=image, input_ids=text, attention_mask=mask, use_image_text_matching_head=False)
    itm = model(pixel_values=image, input_ids=text, attention_mask=mask, use_image_text_matching_head=True)
    return {"queries": itc.image_embeds, "text": itc.text_embeds.reshape(len(text), -1), "match": itm.logits_per_image, "words": head(hidden)}


@torch.no_grad()
def got(system, image, text, hidden):
    seen = system.see(image)
    return {"queries": system.query_features(system.qformer.look(seen).query), "text": system.text_features(text),
            "match": system.match_logits(seen, text), "words": system.heads.words(hidden, system.qformer.embed.weight)}


def inputs():
    text = torch.randint(3, 38, (3, 7))
    text[0, 5:] = 0
    return torch.randn(3, 3, 28, 28), text, torch.randn(3, 7, WIDTH)


def opened(place):
    return import_(place, LAYOUT, lambda n: preset_of("blip2", n))


def test_released_file_in_and_out(theirs, tmp_path):
    model, head, state, folder = theirs
    ours, preset = opened(folder)
    batch = inputs()
    assert_agree(got(ours, *batch), want(model, head, *batch))
    assert preset.config.decode == VOCAB - 1 and preset.config.qformer.every == 2 and ours.temperature.item() == pytest.approx(0.05)
    begun = torch.cat([torch.full_like(batch[1][:, :1], ours.decode), batch[1][:, 1:]], 1)
    assert ours.align({"image": batch[0], "text": begun.clamp(max=VOCAB - 2)}).total().isfinite()

    export(ours.state_dict(), preset.config, LAYOUT, tmp_path / "back", preset.feed)
    back = read_state(tmp_path / "back" / "blip2_pretrained.pth")
    assert set(back) == {k for k in state if not k.endswith("position_ids")}
    for name, value in back.items():
        torch.testing.assert_close(value, state[name].reshape(value.shape), rtol=0, atol=0)


def test_the_image_tower_is_read_from_the_file_beside_it_without_its_last_block(theirs, tmp_path):
    *_, state, _ = theirs
    eye = {k.removeprefix("visual_encoder."): v for k, v in state.items() if k.startswith("visual_encoder.")}
    rest = {k: v for k, v in state.items() if not k.startswith("visual_encoder.")}
    torch.save({"model": rest}, tmp_path / "blip2_pretrained.pth")
    with pytest.raises(UserError, match=r"no image tower.*eva_vit_g"):
        opened(tmp_path)
    more = {k.replace("blocks.1.", "blocks.2."): v.clone() for k, v in eye.items() if k.startswith("blocks.1.")}
    torch.save({**eye, **more, "norm.weight": torch.ones(WIDE), "norm.bias": torch.ones(WIDE)}, tmp_path / "eva_vit_g.pth")
    ours, preset = opened(tmp_path)
    assert preset.config.vision.body.depth == 2
    batch = inputs()
    assert_agree(got(ours, *batch), want(*theirs[:2], *batch))


@pytest.mark.parametrize("break_, says", [
    (lambda s: s.pop("text_proj.weight"), "lacks text_proj"), (lambda s: s.update(extra=torch.zeros(2)), "extra"),
    (lambda s: s.pop("visual_encoder.blocks.0.attn.v_bias"), "missing"),
    (lambda s: s.update({"Qformer.cls.predictions.decoder.weight": torch.zeros(VOCAB, WIDTH)}), "copies differ")])
def test_damaged_files_are_refused_by_name(theirs, tmp_path, break_, says):
    state = dict(theirs[2])
    break_(state)
    torch.save(state, tmp_path / "blip2_pretrained.pth")
    with pytest.raises(UserError, match=says):
        opened(tmp_path)


def test_other_forms_are_refused():
    with pytest.raises(UserError, match="no language model"):
        LAYOUT.keymap(preset_of("blip2").config)
    with pytest.raises(UserError, match="plain EVA tower"):
        LAYOUT.write(preset_of("blip2").config.but(language=None))
