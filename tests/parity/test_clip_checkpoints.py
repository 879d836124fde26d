"""CLIP through published files and back: transformers, open_clip, OpenAI. Random weights, toy sizes, every tolerance 1e-4."""
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import load_file, save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.head import Linear, TanhHead
from polysense.objectives.contrastive import info_nce
from polysense.systems.align import clip
from polysense.weights import bert_hf, clip_hf
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_
from polysense.weights.keymap import KeyMap, load_into, rule, scalar
from polysense.weights.layout import read_checkpoint

VOCAB, LENGTH, IMAGE = 100, 12, 32
LAYOUTS = clip.weights


def presets(name: str):
    return preset_of("clip", name)


def texts(end: int) -> torch.Tensor:
    """Ends at different places, padded with the end token, once with a larger id before the end."""
    ids = torch.randint(3, end if end > 3 else VOCAB - 2, (3, LENGTH))
    for row, at in enumerate((4, 7, LENGTH - 1)):
        ids[row, at:] = end
    ids[1, 2] = VOCAB - 1 if end < VOCAB - 1 else 5
    return ids


@torch.no_grad()
def outputs(system, image: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    one, two = system.encode_image(image), system.encode_text(ids)
    return {"image": one, "text": two, "logits": system.scale * one @ two.T, "loss": info_nce(one, two, system.scale)}


def set_scale(model, at: str) -> None:
    """A temperature whose clamp is not reached, as CLIP's own."""
    with torch.no_grad():
        getattr(model, at).fill_(2.5)


def hf_clip(act: str, end: int, width: int = 32, depth: int = 2, eps: float = 1e-5):
    hf = reference("transformers")
    body = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 4, "intermediate_size": 3 * width, "hidden_act": act,
            "layer_norm_eps": eps}
    text = {"vocab_size": VOCAB, "max_position_embeddings": LENGTH, "eos_token_id": end, "bos_token_id": 1, "pad_token_id": 0, **body}
    model = shake(hf.CLIPModel(hf.CLIPConfig(text_config=text, projection_dim=24, vision_config={**body, "image_size": IMAGE, "patch_size": 8})))
    set_scale(model, "logit_scale")
    return model


@torch.no_grad()
def hf_outputs(model, image: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    out = model(input_ids=ids, pixel_values=image, return_loss=True)
    image, text = (F.normalize(x, dim=-1) for x in (out.image_embeds, out.text_embeds))
    return {"image": image, "text": text, "logits": out.logits_per_image, "loss": out.loss}


@pytest.mark.parametrize("act, end, width, depth, eps", [("quick_gelu", 2, 32, 2, 1e-5), ("gelu", 50, 32, 2, 1e-5), ("quick_gelu", 50, 64, 3, 1e-3)])
def test_transformers_clip_in_and_out(tmp_path, act, end, width, depth, eps):
    theirs = hf_clip(act, end, width, depth, eps)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", LAYOUTS["hf"], presets)
    assert preset.config.text.end == (None if end == 2 else end)
    image = torch.randn(3, 3, IMAGE, IMAGE)
    ids = texts(VOCAB - 1 if end == 2 else end)
    want = hf_outputs(theirs, image, ids)
    assert_agree(outputs(ours, image, ids), want)

    export(ours.state_dict(), preset.config, LAYOUTS["hf"], tmp_path / "back", preset.feed)
    again = reference("transformers").CLIPModel.from_pretrained(tmp_path / "back").eval()
    assert_agree(hf_outputs(again, image, ids), want)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in theirs.state_dict().items())
    plan = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    assert plan["image_mean"] == list(preset.feed.image.mean) and plan["size"] == {"shortest_edge": IMAGE}
    third, same = import_(tmp_path / "back", LAYOUTS["hf"], presets)
    assert list(same.lines()) == list(preset.lines()) and assert_agree(outputs(third, image, ids), want) <= 1e-4


def test_the_pooling_rule_and_the_activation_are_really_read(tmp_path):
    """Each difference that a config file alone carries changes the outputs beyond the tolerance: parity above is no accident."""
    theirs = hf_clip("gelu", 50)
    theirs.save_pretrained(tmp_path)
    image, ids = torch.randn(3, 3, IMAGE, IMAGE), texts(50)
    want = hf_outputs(theirs, image, ids)
    for change in ({"hidden_act": "quick_gelu"}, {"eos_token_id": 2}):
        config = json.loads((tmp_path / "config.json").read_text())
        config["text_config"].update(change)
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="usual causes"):
            assert_agree(outputs(import_(tmp_path, LAYOUTS["hf"], presets)[0], image, ids), want)


def test_shards_half_precision_old_buffers_and_pickles_read_the_same(tmp_path):
    theirs = hf_clip("quick_gelu", 50)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    image, ids = torch.randn(3, 3, IMAGE, IMAGE), texts(50)
    want = hf_outputs(theirs, image, ids)
    assert_agree(outputs(import_(tmp_path / "shards", LAYOUTS["hf"], presets)[0], image, ids), want)
    old = {**theirs.state_dict(), "text_model.embeddings.position_ids": torch.arange(LENGTH)[None],
           "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    (tmp_path / "pickle").mkdir()
    torch.save(old, tmp_path / "pickle" / "pytorch_model.bin")
    (tmp_path / "pickle" / "config.json").write_text((tmp_path / "shards" / "config.json").read_text())
    assert_agree(outputs(import_(tmp_path / "pickle", LAYOUTS["hf"], presets)[0], image, ids), want)
    theirs.half().save_pretrained(tmp_path / "half")
    halved = import_(tmp_path / "half", LAYOUTS["hf"], presets)[0]
    assert halved.vision.patch.weight.dtype == torch.float32
    assert_agree(outputs(halved, image, ids), hf_outputs(theirs.float(), image, ids))


def open_clip_model(vision: dict, act: str = "gelu", custom: bool = False, **text):
    open_clip = reference("open_clip")
    of = {"context_length": LENGTH, "vocab_size": VOCAB, "width": 64, "heads": 1, "layers": 2, **text}
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = shake(kind(embed_dim=24, vision_cfg=vision, text_cfg=of, quick_gelu=act == "quick_gelu"))
    set_scale(model, "logit_scale")
    return model, {"embed_dim": 24, "quick_gelu": act == "quick_gelu", "vision_cfg": vision, "text_cfg": of}


def write_open_clip(folder, model, cfg: dict) -> None:
    """As open_clip's own push_to_hf_hub: configuration and weights under its names."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    plan = {"size": [32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": plan}))


@torch.no_grad()
def open_clip_outputs(model, image: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    one, two = model.encode_image(image, normalize=True), model.encode_text(ids, normalize=True)
    logits = model.logit_scale.exp() * one @ two.T
    return {"image": one, "text": two, "logits": logits, "loss": reference("open_clip").ClipLoss()(one, two, model.logit_scale.exp())}


VIT = {"layers": 2, "width": 64, "image_size": IMAGE, "patch_size": 8}
RN = {"layers": [1, 2, 1, 1], "width": 16, "image_size": 64}


@pytest.mark.parametrize("vision, act, custom, text", [
    ({**VIT, "head_width": 16}, "gelu", False, {"heads": 4}), (VIT, "quick_gelu", True, {"pool_type": "eos", "eos_id": 50}),
    ({**VIT, "ls_init_value": 0.1, "pool_type": "avg", "norm_kwargs": {"eps": 1e-3}}, "gelu", True, {"ls_init_value": 0.1}),
    (RN, "quick_gelu", False, {}),
], ids=["vit", "vit quick custom eos", "vit scales mean eps", "rn"])
def test_open_clip_in_and_out(tmp_path, vision, act, custom, text):
    theirs, cfg = open_clip_model(vision, act, custom, **text)
    write_open_clip(tmp_path / "theirs", theirs, cfg)
    ours, preset = import_(tmp_path / "theirs", LAYOUTS["open_clip"], presets)
    assert preset.feed.image.mean == (0.5, 0.4, 0.3) and preset.feed.image.size == vision["image_size"]
    image, ids = torch.randn(3, 3, vision["image_size"], vision["image_size"]), texts(text.get("eos_id", VOCAB - 1))
    want = open_clip_outputs(theirs, image, ids)
    assert_agree(outputs(ours, image, ids), want)

    export(ours.state_dict(), preset.config, LAYOUTS["open_clip"], tmp_path / "back", preset.feed)
    written = json.loads((tmp_path / "back" / "open_clip_config.json").read_text())
    again = reference("open_clip").CLIP(**written["model_cfg"]).eval()
    again.load_state_dict(load_file(tmp_path / "back" / "open_clip_model.safetensors"), strict=True)
    assert_agree(open_clip_outputs(again, image, ids), want)
    assert written["preprocess_cfg"]["mean"] == [0.5, 0.4, 0.3]


@pytest.mark.parametrize("vision", [VIT, RN], ids=["vit", "rn"])
def test_openai_state_and_torchscript_archive_in_and_out(tmp_path, vision):
    theirs, _ = open_clip_model(vision, "quick_gelu")
    size = vision["image_size"]
    image, ids = torch.randn(3, 3, size, size), texts(VOCAB - 1)
    want = open_clip_outputs(theirs, image, ids)
    sizes = {"input_resolution": torch.tensor(size), "context_length": torch.tensor(LENGTH), "vocab_size": torch.tensor(VOCAB)}
    torch.save({**theirs.state_dict(), **sizes}, tmp_path / "state.pt")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.jit.trace(theirs, (image, ids), check_trace=False, strict=False).save(str(tmp_path / "archive.pt"))
    for name in ("state.pt", "archive.pt"):
        ours, preset = import_(tmp_path / name, LAYOUTS["openai"], presets)
        assert_agree(outputs(ours, image, ids), want)

    export(ours.state_dict(), preset.config, LAYOUTS["openai"], tmp_path / "back.pt")
    build = reference("open_clip.model").build_model_from_openai_state_dict
    again = build(torch.load(tmp_path / "back.pt", weights_only=True), cast_dtype=torch.float32).float()
    # the reference stores halves
    assert_agree(open_clip_outputs(again, image, ids), want, tolerance=1e-2)
    halves = {k: v.half().float() if k in again.state_dict() and v.is_floating_point() else v for k, v in theirs.state_dict().items()}
    assert all(torch.equal(v, halves[k]) or torch.equal(v, theirs.state_dict()[k]) for k, v in again.state_dict().items())


def test_the_openai_layout_refuses_what_it_cannot_say(tmp_path):
    theirs, cfg = open_clip_model(VIT, "gelu")
    write_open_clip(tmp_path / "gelu", theirs, cfg)
    ours, preset = import_(tmp_path / "gelu", LAYOUTS["open_clip"], presets)
    with pytest.raises(UserError, match="QuickGELU"):
        export(ours.state_dict(), preset.config, LAYOUTS["openai"], tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
    with pytest.raises(UserError, match="open_clip"):
        LAYOUTS["hf"].write(presets("rn50").config)


def test_one_model_crosses_all_three_layouts(tmp_path):
    """open_clip -> ours -> transformers -> ours -> OpenAI -> ours: the same outputs each time, bit-equal weights at the end."""
    theirs, cfg = open_clip_model(VIT, "quick_gelu")
    write_open_clip(tmp_path / "a", theirs, cfg)
    image, ids = torch.randn(3, 3, IMAGE, IMAGE), texts(VOCAB - 1)
    first, preset = import_(tmp_path / "a", LAYOUTS["open_clip"], presets)
    export(first.state_dict(), preset.config, LAYOUTS["hf"], tmp_path / "b", preset.feed)
    model = reference("transformers").CLIPModel.from_pretrained(tmp_path / "b").eval()
    assert_agree(hf_outputs(model, image, ids), open_clip_outputs(theirs, image, ids))
    second, preset = import_(tmp_path / "b", LAYOUTS["hf"], presets)
    export(second.state_dict(), preset.config, LAYOUTS["openai"], tmp_path / "c")
    third, _ = import_(tmp_path / "c", LAYOUTS["openai"], presets)
    assert all(torch.equal(v, third.state_dict()[k]) for k, v in first.state_dict().items())


@torch.no_grad()
def test_towers_alone_under_published_and_in_memory_names(tmp_path):
    """transformers 5 saves a CLIP tower without the prefix that transformers 4 wrote; both are read."""
    hf, whole = reference("transformers"), hf_clip("gelu", 50)
    system = import_preset(tmp_path, whole).config.build().eval()
    image, ids = torch.randn(2, 3, IMAGE, IMAGE), texts(50)
    vision, text = hf.CLIPVisionModel(whole.config.vision_config), hf.CLIPTextModel(whole.config.text_config)
    for model, table, prefix in ((vision, clip_hf.VISION, "vision_model."), (text, clip_hf.TEXT, "text_model.")):
        state = shake(model).state_dict()
        for names in (state, {prefix + k: v for k, v in state.items()}):
            load_into(system.vision if model is vision else system.text, table, names)
        back = table.save(table.load(state))
        assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())
    assert_agree({"image": system.vision(image).pooled, "text": system.text(ids).pooled},
            {"image": vision(image).pooler_output, "text": text(ids).pooler_output})


def import_preset(folder, model):
    model.save_pretrained(folder / "whole")
    return import_(folder / "whole", LAYOUTS["hf"], presets)[1]


@torch.no_grad()
def test_vision_text_dual_encoder_is_a_sum_of_tables(tmp_path):
    """transformers' VisionTextDualEncoder (CLIP's ViT beside BERT) reads through two tower tables and three rules."""
    hf = reference("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    image_config = hf.CLIPVisionConfig(image_size=IMAGE, patch_size=8, hidden_act="gelu", **sizes)
    text_config = hf.BertConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, **sizes)
    both = hf.VisionTextDualEncoderConfig.from_vision_text_configs(image_config, text_config, projection_dim=24)
    theirs = shake(hf.VisionTextDualEncoderModel(both))
    set_scale(theirs, "logit_scale")
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    whole = import_preset(tmp_path, hf_clip("gelu", 50))
    bert = preset_of("lit", "tiny").config.text.but(pooler=TanhHead.Config(into=32, hidden=32))
    config = whole.config.but(text=bert, text_head=Linear.Config(into=32, out=24)).but(**bert_hf.sizes(text_config.to_dict(), "text"))
    ours = config.build().eval()
    table = clip_hf.VISION.at("vision_model", "vision") + bert_hf.keymap(config.text).at("text_model", "text") + KeyMap((
            rule("visual_projection.weight", "image_head.weight"), rule("text_projection.weight", "text_head.weight"),
            rule("logit_scale", "log_scale", scalar)))
    load_into(ours, table, state)
    image, ids = torch.randn(3, 3, IMAGE, IMAGE), torch.randint(1, VOCAB, (3, LENGTH))
    ids[1, 5:] = 0
    out = theirs(input_ids=ids, pixel_values=image, attention_mask=(ids != 0).long(), return_loss=True)
    assert_agree(outputs(ours, image, ids), {"image": F.normalize(out.image_embeds, dim=-1), "text": F.normalize(out.text_embeds, dim=-1),
                                        "logits": out.logits_per_image, "loss": out.loss})
    back = table.save(ours.state_dict())
    theirs.load_state_dict(back, strict=True)


def test_a_checkpoint_named_by_the_wrong_layout_says_which_it_is(tmp_path):
    hf_clip("gelu", 50).save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="looks like clip/hf"):
        read_checkpoint(tmp_path / "hf", LAYOUTS["openai"])
