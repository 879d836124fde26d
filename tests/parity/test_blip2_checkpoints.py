"""BLIP-2 through published files and back: Blip2QFormerModel, Blip2ForConditionalGeneration (OPT, FlanT5), Blip2ForImageTextRetrieval. Random
weights, toy sizes, tolerance 1e-4."""
import json

import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.lmm import blip2
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

LAYOUT, IMAGE_TOKEN = blip2.weights["hf"], 59


def parts():
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 28, "patch_size": 14}
    qformer = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40,
               "encoder_hidden_size": 32, "max_position_embeddings": 12, "pad_token_id": 0}
    text = {"model_type": "opt", "vocab_size": 60, "hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "ffn_dim": 32, "max_position_embeddings": 32, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    return vision, qformer, text


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    hf = reference("transformers")
    vision, qformer, text = parts()
    torch.manual_seed(0)
    model = shake(hf.Blip2ForConditionalGeneration(hf.Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=5,
                                                                  image_token_index=59)))
    folder = tmp_path_factory.mktemp("speaker")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def replier(tmp_path_factory):
    """With FlanT5."""
    hf = reference("transformers")
    vision, qformer, _ = parts()
    torch.manual_seed(2)
    text = {"model_type": "t5", "vocab_size": 60, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 3,
            "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
            "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0}
    model = hf.Blip2ForConditionalGeneration(hf.Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=5,
                                                            image_token_index=59, use_decoder_only_language_model=False))
    model.language_model.lm_head.weight = torch.nn.Parameter(torch.randn(60, 16))          # published files hold a head of their own
    shake(model)
    folder = tmp_path_factory.mktemp("replier")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def matcher(tmp_path_factory):
    hf = reference("transformers")
    vision, qformer, text = parts()
    torch.manual_seed(1)
    model = shake(hf.Blip2ForImageTextRetrieval(hf.Blip2Config(
        vision_config=vision, qformer_config={**qformer, "use_qformer_text_input": True}, text_config=text, num_query_tokens=5,
        image_text_hidden_size=10)))
    folder = tmp_path_factory.mktemp("matcher")
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def speaker_want(model, image, text):
    ids = torch.cat([torch.full((len(text), 5), IMAGE_TOKEN), text], 1)
    out = model(pixel_values=image, input_ids=ids, attention_mask=(ids != 1).long())
    query = out.qformer_outputs.last_hidden_state
    return {"vision": out.vision_outputs.last_hidden_state, "query": query, "prompt": model.language_projection(query),
            "logits": out.logits[:, 5:][text != 1]}



@torch.no_grad()
def speaker_got(system, image, text):
    seen = system.see(image)
    query = system.qformer.look(seen).query
    soft, real = system.to_language(query), text != 1
    x, mask = system.language.join(soft, text, real)
    return {"vision": seen, "query": query, "prompt": soft, "logits": system.language.logits(system.language.read(x, mask))[:, 5:][real]}


def presets(name):
    return preset_of("blip2", name)


def test_opt_speaker_in_and_out(speaker, tmp_path):
    model, folder = speaker
    ours, preset = import_(folder, LAYOUT, presets)
    image, text = torch.randn(3, 3, 28, 28), torch.randint(3, 58, (3, 7))
    text[:, 0], text[0, 5:] = 2, 1
    want = speaker_want(model, image, text)
    assert_agree(speaker_got(ours, image, text), want)
    assert preset.config.qformer.queries == 5 and preset.config.language.vocab == 60 and preset.feed.image.size == 28

    export(ours.state_dict(), preset.config, LAYOUT, tmp_path / "back", preset.feed)
    again = reference("transformers").Blip2ForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    assert_agree(speaker_want(again, image, text), want)


@torch.no_grad()
def replier_want(model, image, text, reply):
    ids = torch.cat([torch.full((len(text), 5), IMAGE_TOKEN), text], 1)
    out = model(pixel_values=image, input_ids=ids, attention_mask=(ids != 0).long(), labels=reply)
    return {"query": out.qformer_outputs.last_hidden_state, "logits": out.logits, "loss": out.loss}


@torch.no_grad()
def replier_got(system, image, text, reply):
    query = system.qformer.look(system.see(image)).query
    x, mask = system.language.join(system.to_language(query), text, text != 0)
    logits = system.language.predict(reply, x, mask)[:, :-1]
    return {"query": query, "logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), reply.flatten())}


def test_flan_t5_replier_in_and_out(replier, tmp_path):
    model, folder = replier
    assert (folder / "config.json").is_file()
    ours, preset = import_(folder, LAYOUT, presets)
    image, text, reply = torch.randn(3, 3, 28, 28), torch.randint(3, 58, (3, 7)), torch.randint(3, 58, (3, 5))
    text[:, 6], text[0, 4:] = 1, torch.tensor([1, 0, 0])
    want = replier_want(model, image, text, reply)
    assert_agree(replier_got(ours, image, text, reply), want)
    assert preset.config.end == 1 and preset.config.start == 0 and preset.config.language.encoder.depth == 2

    prompt = torch.cat([torch.zeros(3, 1, dtype=torch.long), text], 1)                      # as the feed writes it: start, words, end
    new = ours.generate_text(image, prompt, max_new=6)
    theirs = model.generate(pixel_values=image, input_ids=torch.cat([torch.full((3, 5), IMAGE_TOKEN), text], 1), max_new_tokens=6, do_sample=False,
                            attention_mask=torch.cat([torch.ones(3, 5), text != 0], 1).long())
    for a, b in zip(new, theirs[:, 1:] if int(theirs[0, 0]) == 0 else theirs, strict=True):
        stop = int((a == 1).int().argmax()) + 1 if (a == 1).any() else len(a)
        assert torch.equal(a[:stop], b[:stop])

    export(ours.state_dict(), preset.config, LAYOUT, tmp_path / "back", preset.feed)
    again = reference("transformers").Blip2ForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    assert_agree(replier_want(again, image, text, reply), want)


def test_generation_is_theirs(speaker):
    model, folder = speaker
    ours, _ = import_(folder, LAYOUT, presets)
    image = torch.randn(2, 3, 28, 28)
    prompt = torch.tensor([[2, 7, 9], [2, 11, 5]])
    ids = torch.cat([torch.full((2, 5), IMAGE_TOKEN), prompt], 1)
    theirs = model.generate(pixel_values=image, input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    new = ours.generate_text(image, prompt, max_new=6)
    for a, b in zip(new, theirs, strict=True):
        b = b[-6:] if b.shape[0] >= 6 else b
        stop = int((a == 2).int().argmax()) + 1 if (a == 2).any() else len(a)
        assert torch.equal(a[:stop], b[:stop])


@torch.no_grad()
def matcher_want(model, image, text):
    mask = (text != 0).long()
    itc = model(pixel_values=image, input_ids=text, attention_mask=mask, use_image_text_matching_head=False)
    itm = model(pixel_values=image, input_ids=text, attention_mask=mask, use_image_text_matching_head=True)
    return {"queries": itc.image_embeds, "text": itc.text_embeds.squeeze(1) if itc.text_embeds.ndim == 3 else itc.text_embeds,
            "similar": itc.logits_per_image, "match": itm.logits_per_image}


@torch.no_grad()
def matcher_got(system, image, text):
    seen = system.see(image)
    queries, words = system.query_features(system.qformer.look(seen).query), system.text_features(text)
    return {"queries": queries, "text": words, "similar": blip2.best_query(queries, words), "match": system.match_logits(seen, text)}


def test_matching_model_in_and_out(matcher, tmp_path):
    model, folder = matcher
    ours, preset = import_(folder, LAYOUT, presets)
    image, text = torch.randn(3, 3, 28, 28), torch.randint(3, 38, (3, 7))
    text[0, 5:] = 0
    want = matcher_want(model, image, text)
    assert_agree(matcher_got(ours, image, text), want)
    assert ours.match_text(image, text).shape == (3,) and torch.allclose(ours.encode_image(image).norm(dim=1), torch.ones(3))

    export(ours.state_dict(), preset.config, LAYOUT, tmp_path / "back", preset.feed)
    again = reference("transformers").Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "back").eval()
    assert_agree(matcher_want(again, image, text), want)


def test_the_qformer_alone():
    hf = reference("transformers")
    _, of, _ = parts()
    theirs = shake(hf.Blip2QFormerModel(hf.Blip2QFormerConfig(**{**of, "use_qformer_text_input": True})))
    from polysense.connectors.qformer import QFormer
    from polysense.nn.mlp import MLP
    from polysense.weights.blip2_hf import QFORMER
    from polysense.weights.keymap import load_into
    ours = QFormer.Config(queries=5, width=24, depth=3, heads=4, source=32, vocab=40, length=12, mlp=MLP.Config(hidden=40)).build().eval()
    kept = {k: v for k, v in ours.state_dict().items() if k in ("query", "embed.weight", "position")}
    state = dict(theirs.state_dict())
    loaded = QFORMER.load(state)
    assert set(loaded) | set(kept) == set(ours.state_dict())
    ours.load_state_dict(loaded | kept)
    assert load_into is not None and set(QFORMER.save({k: v for k, v in ours.state_dict().items() if k not in kept})) == set(state)
    image = torch.randn(2, 6, 32)
    with torch.no_grad():
        want = theirs(query_embeds=ours.query.expand(2, -1, -1), encoder_hidden_states=image).last_hidden_state
        assert_agree({"query": ours.look(image).query}, {"query": want})


@pytest.mark.parametrize("break_, says", [(lambda f: (f / "model.safetensors").write_bytes(b""), "empty"),
                                          (lambda f: (f / "config.json").write_text('{"model_type": "opt"}'), "model_type"),
                                          (lambda f: (f / "config.json").write_text("{"), "JSON")])
def test_damaged_folders_are_refused_in_one_line(speaker, tmp_path, break_, says):
    _, folder = speaker
    for file in ("model.safetensors", "config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    break_(tmp_path)
    with pytest.raises(UserError, match=says):
        import_(tmp_path, LAYOUT, presets)


def test_what_transformers_has_no_class_for_is_refused(speaker, tmp_path):
    with pytest.raises(UserError, match="none with both"):
        LAYOUT.keymap(preset_of("blip2").config)
    _, folder = speaker
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["model_type"] = "bloom"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="those with OPT or FlanT5"):
        import_(tmp_path, LAYOUT, presets)
