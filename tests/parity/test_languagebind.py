"""LanguageBind's released layout at toy size, both ways: towers against transformers' CLIPModel, the look along time against a plain twin."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import load_file, save_file
from torch import nn

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.mel import MelChunks
from polysense.objectives.contrastive import info_nce
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

recipe = polysense.load("languagebind")
LAYOUT = recipe.weights["hf"]
TEXT = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 12,
        "hidden_act": "gelu", "eos_token_id": 59}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
          "hidden_act": "gelu"}
OWN = {"image": {}, "depth": {"max_depth": 10}, "thermal": {}, "video": {"add_time_attn": True, "num_frames": 3},
       "audio": {"num_mel_bins": 16, "target_length": 40, "audio_mean": -4.2, "audio_std": 4.5, "audio_sample_rate": 16000}}


def presets(name: str):
    return preset_of("languagebind", name)


def their_clip(name: str) -> nn.Module:
    """transformers' CLIPModel; for sounds with the positions of a plane, for videos with a look along time before every layer."""
    transformers = reference("transformers")
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=20)
    model = transformers.CLIPModel(config)
    if name == "audio":
        where = model.vision_model.embeddings
        where.position_embedding = nn.Embedding(1 + 2 * 5, 32)
        where.position_ids = torch.arange(11)[None]
    if name == "video":
        for layer in model.vision_model.encoder.layers:
            layer.temporal_embedding = nn.Parameter(torch.zeros(1, 3, 32))
            layer.temporal_layer_norm1 = nn.LayerNorm(32)
            layer.temporal_attn = type(layer.self_attn)(config.vision_config)
    return shake(model)


def image_features(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Pictures [B,3,H,W], or clips [B,T,3,H,W], through their modules one by one."""
    vision, frames = model.vision_model, pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
    where = vision.embeddings
    x = where.patch_embedding(frames).flatten(2).transpose(1, 2)
    x = torch.cat([where.class_embedding.expand(len(x), 1, -1), x], 1) + where.position_embedding.weight
    x = vision.pre_layrnorm(x)
    for layer in vision.encoder.layers:
        if hasattr(layer, "temporal_attn"):
            t = pixels.shape[1]
            y = x.unflatten(0, (-1, t)) + layer.temporal_embedding[:, :, None]
            out = torch.empty_like(y)
            for place in range(y.shape[2]):                      # every place for itself, over the frames
                row = y[:, :, place]
                out[:, :, place] = row + layer.temporal_attn(layer.temporal_layer_norm1(row))[0]
            x = out.flatten(0, 1)
        x = x + layer.self_attn(layer.layer_norm1(x))[0]
        x = x + layer.mlp(layer.layer_norm2(x))
    pooled = vision.post_layernorm(x[:, 0])
    pooled = pooled.unflatten(0, pixels.shape[:2]).mean(1) if pixels.ndim == 5 else pooled
    return F.normalize(model.visual_projection(pooled), dim=-1)


def published(name: str, folder, wrap: str = "", **more) -> nn.Module:
    """Their files in a folder; wrap: where peft puts the encoder."""
    theirs = their_clip(name)
    state = {("vision_model." + k.removeprefix("vision_model.") if k.startswith("vision_model.") else k): v for k, v in theirs.state_dict().items()}
    state = {k: v.clone() for k, v in state.items() if not k.endswith("position_ids")}
    if wrap:
        state = {k.replace("vision_model.encoder.", wrap): v for k, v in state.items()}
    save_file(state, folder / "model.safetensors")
    config = {"model_type": f"LanguageBind{name.capitalize()}", "projection_dim": 20, "text_config": TEXT, "vision_config": VISION | OWN[name] | more}
    (folder / "config.json").write_text(json.dumps(config))
    return theirs


def sample(name: str) -> torch.Tensor:
    torch.manual_seed(5)
    return {"image": torch.randn(3, 3, 32, 32), "depth": 12 * torch.rand(3, 1, 32, 32), "thermal": torch.rand(3, 1, 32, 32),
            "video": torch.randn(3, 3, 3, 32, 32), "audio": 0.1 * torch.randn(3, 40 * 160 + 4000)}[name]


@torch.no_grad()
@pytest.mark.parametrize("name", list(OWN))
def test_features_and_loss_are_clips_in_and_out(name, tmp_path):
    torch.manual_seed(0)
    theirs = published(name, tmp_path)
    ours, preset = import_(tmp_path, LAYOUT, presets)
    given, text = sample(name), torch.randint(3, 50, (3, 9))
    text[:, 6] = 59
    own = getattr(ours, name)
    seen = given if own.tower.__class__.__name__ == "ViT" else own.tower.front(given)
    assert (seen.shape[2] if name == "video" else seen.shape[1]) == 3, "every modality is three channels in the end"
    words = theirs.text_model(text).pooler_output if hasattr(theirs, "text_model") else None
    want = {"seen": image_features(theirs, seen), "text": F.normalize(theirs.text_projection(words), dim=-1)}
    got = {"seen": getattr(ours, f"encode_{name}")(given), "text": ours.encode_text(text)}
    assert_agree(got, want)
    logits = theirs.logit_scale.exp().clamp(max=100) * want["seen"] @ want["text"].T
    loss = (F.cross_entropy(logits, torch.arange(3)) + F.cross_entropy(logits.T, torch.arange(3))) / 2
    assert_agree({"loss": info_nce(got["seen"], got["text"], own.scale)}, {"loss": loss})
    if name == "image":                      # the very call of transformers' model
        assert_agree({"seen": got["seen"]}, {"seen": F.normalize(theirs.visual_projection(theirs.vision_model(given).pooler_output), dim=-1)})
    export(ours.state_dict(), preset.config, LAYOUT, tmp_path / "back", preset.feed)
    back, state = load_file(tmp_path / "back" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[k].reshape(v.shape), v) for k, v in state.items())
    again, _ = import_(tmp_path / "back", LAYOUT, presets)
    assert torch.equal(getattr(again, f"encode_{name}")(given), got["seen"]), "its configuration is enough"


@torch.no_grad()
def test_updates_as_peft_saves_them_are_read_and_merge(tmp_path):
    torch.manual_seed(0)
    published("depth", tmp_path, wrap="vision_model.encoder.base_model.model.", lora_r=2, lora_alpha=16)
    state, plain = load_file(tmp_path / "model.safetensors"), tmp_path / "plain"
    plain.mkdir()
    merged = {k.replace("base_model.model.", ""): v.clone() for k, v in state.items()}
    for i in range(2):
        for linear in ("q_proj", "k_proj", "v_proj", "out_proj"):
            at = f"layers.{i}.self_attn.{linear}"
            a, b = 0.2 * torch.randn(2, 32), 0.2 * torch.randn(32, 2)
            for n, value in (("A", a), ("B", b)):
                state[f"vision_model.encoder.base_model.model.{at}.lora_{n}.default.weight"] = value
            merged[f"vision_model.encoder.{at}.weight"] += 8 * b @ a
    save_file(state, tmp_path / "model.safetensors")
    save_file(merged, plain / "model.safetensors")
    (plain / "config.json").write_text((tmp_path / "config.json").read_text())
    ours, preset = import_(tmp_path, LAYOUT, presets)
    twin, bare = import_(plain, LAYOUT, presets)
    assert preset.config.depth.adapter.rank == 2 and bare.config.depth.adapter is None
    assert_agree({"depth": ours.encode_depth(sample("depth"))}, {"depth": twin.encode_depth(sample("depth"))})
    newer = {k.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
             if ".base_model." in k and ".self_attn." in k and "lora" not in k else k: v
             for k, v in state.items()}
    save_file(newer, tmp_path / "model.safetensors")
    assert_agree({"depth": import_(tmp_path, LAYOUT, presets)[0].encode_depth(sample("depth"))}, {"depth": ours.encode_depth(sample("depth"))})
    export(ours.state_dict(), preset.config, LAYOUT, tmp_path / "back", preset.feed)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[k].reshape(v.shape), v) for k, v in state.items())


@pytest.mark.parametrize("frames", [40, 41, 42, 55, 130])
def test_pieces_of_a_sound_begin_where_the_release_cuts(frames):
    """numpy.array_split of all beginnings into three ranges, the first of each; where a range is empty, 0."""
    chunks = MelChunks.Config(bins=8, frames=40).build().eval()
    ranges = np.array_split(range(frames - 40 + 1), 3)
    assert chunks.starts(frames - 40, 2).tolist() == [[int(r[0]) if len(r) else 0 for r in ranges]] * 2


def test_what_the_layout_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match="one modality a file"):
        LAYOUT.write(preset_of("languagebind").config)
    with pytest.raises(UserError, match="LanguageBindAudio"):
        LAYOUT.read({"model_type": "clip"}, {})
    with pytest.raises(UserError, match=r"config\.json is missing"):
        LAYOUT.read({}, {})
