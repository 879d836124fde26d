"""EVA-CLIP against open_clip and timm, through both published layouts. Random weights, toy size."""
import json

import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import load_file, save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.objectives.contrastive import info_nce
from polysense.systems.align import eva_clip
from polysense.towers.eva import eva02
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

TEXT = {"context_length": 12, "vocab_size": 100, "width": 64, "heads": 1, "layers": 2}
ARGS = {"eva02_base_patch16_clip_224": {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2},
        "eva_giant_patch14_224": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2},
        "eva02_enormous_patch14_clip_224": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 16, "mlp_ratio": 3.0}}


def presets(name: str):
    return preset_of("eva_clip", name)


def build(name: str, monkeypatch):
    """open_clip's model around timm's architecture of that name, at toy size."""
    import functools

    open_clip = reference("open_clip")
    timm = reference("timm")
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, **ARGS[name]))
    config = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "token",
                                              "timm_proj": None}, "text_cfg": TEXT}
    return shake(open_clip.CustomTextCLIP(**config)), config


def words(n: int = 3) -> torch.Tensor:
    text = torch.randint(3, 98, (n, 12))
    text[:, -1] = 99
    return text


@torch.no_grad()
@pytest.mark.parametrize("name", list(ARGS))
def test_features_and_loss_are_open_clips_in_and_out(name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    theirs, config = build(name, monkeypatch)
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    ours, preset = import_(tmp_path, eva_clip.weights["open_clip"], presets)
    image, text = torch.randn(3, 3, 32, 32), words()
    want = {"image": theirs.encode_image(image, normalize=True), "text": theirs.encode_text(text, normalize=True)}
    got = {"image": ours.encode_image(image), "text": ours.encode_text(text)}
    assert_agree(got, want)
    logits = theirs.logit_scale.exp().clamp(max=100) * want["image"] @ want["text"].T
    target = (F.cross_entropy(logits, torch.arange(3)) + F.cross_entropy(logits.T, torch.arange(3))) / 2
    assert_agree({"loss": info_nce(got["image"], got["text"], ours.scale)}, {"loss": target})
    back = eva_clip.weights["open_clip"].keymap(preset.config).save(ours.state_dict())
    state = theirs.state_dict()
    assert back.keys() == state.keys() and all(torch.equal(back[k].reshape(state[k].shape), state[k]) for k in back)


@torch.no_grad()
def test_the_tower_alone_is_timms_with_some_patches_too():
    torch.manual_seed(0)
    timm = reference("timm.models.eva")
    args = ARGS["eva02_base_patch16_clip_224"]
    theirs = shake(timm.Eva(**args, num_classes=0, qkv_fused=False, mlp_ratio=8 / 3, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True,
                            use_rot_pos_emb=True, ref_feat_shape=(16, 16), global_pool="token", patch_drop_rate=0.5))
    config = eva_clip.config(eva02(32, 8, 128, 2, 2), eva_clip.words(64, 1, 1), 24, 0.5)
    table = eva_clip.weights["open_clip"].keymap(config)
    state = table.load({f"visual.trunk.{k}": v for k, v in theirs.state_dict().items()})
    ours = config.vision.build().eval()
    ours.load_state_dict({k.removeprefix("vision."): v for k, v in state.items()})
    image = torch.randn(4, 3, 32, 32)
    assert_agree({"tokens": ours(image).tokens}, {"tokens": theirs.forward_features(image)})
    kept: list[torch.Tensor] = []
    theirs.patch_drop.register_forward_hook(lambda m, args, out: kept.append(out[1]))
    theirs.train()
    torch.manual_seed(3)
    want = theirs.forward_features(image)
    assert kept[0].shape == (4, 8)
    assert_agree({"part": ours(image, keep=kept[0]).tokens}, {"part": want})


@torch.no_grad()
def test_the_released_names_mean_the_same(tmp_path, monkeypatch):
    """The authors' names, made of open_clip's by hand: q, k and v with biases of their own, w1 w2 w3, rotations kept as buffers."""
    torch.manual_seed(0)
    theirs, _ = build("eva02_base_patch16_clip_224", monkeypatch)
    state = {}
    for key, value in theirs.state_dict().items():
        for a, b in (("visual.trunk.", "visual."), ("attn.q_proj.bias", "attn.q_bias"), ("attn.v_proj.bias", "attn.v_bias"),
                     ("attn.norm.", "attn.inner_attn_ln."), ("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"), ("mlp.fc2", "mlp.w3"),
                     ("mlp.norm.", "mlp.ffn_ln.")):
            key = key.replace(a, b)
        state[key] = value
    rope = {f"visual.{at}rope.freqs_{n}": torch.zeros(16, 64) for at in ("", "blocks.0.attn.", "blocks.1.attn.") for n in ("cos", "sin")}
    torch.save(state | rope, tmp_path / "EVA02_CLIP_B.pt")
    ours, preset = import_(tmp_path / "EVA02_CLIP_B.pt", eva_clip.weights["official"], presets)
    image, text = torch.randn(3, 3, 32, 32), words()
    assert_agree({"image": ours.encode_image(image), "text": ours.encode_text(text)},
            {"image": theirs.encode_image(image, normalize=True), "text": theirs.encode_text(text, normalize=True)})
    export(ours.state_dict(), preset.config, eva_clip.weights["official"], tmp_path / "back", preset.feed)
    file = next((tmp_path / "back").iterdir())
    again = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    assert again.keys() == state.keys() and all(torch.equal(again[k].reshape(v.shape), v) for k, v in state.items())


@pytest.mark.parametrize("name, preset", [("EVA02-L-14", "paper"), ("EVA02-B-16", "b_16"), ("EVA01-g-14", "g_14"), ("EVA02-E-14", "e_14"),
                                          ("EVA02-L-14-336", "paper_336")])
def test_published_sizes(name, preset):
    open_clip = reference("open_clip")
    config, layout = open_clip.get_model_config(name), eva_clip.weights["open_clip"]
    with torch.device("meta"):
        theirs = open_clip.CustomTextCLIP(**{k: v for k, v in config.items() if k in ("embed_dim", "vision_cfg", "text_cfg")}).state_dict()
        ours = presets(preset).config.build().state_dict()
    assert {k: v.shape for k, v in layout.keymap(presets(preset).config).load(theirs).items()} == {k: v.shape for k, v in ours.items()}
    base, overrides = layout.read({"model_cfg": config}, theirs)
    read = presets(base).but(**overrides).config
    assert read.vision.but(**{"body.drop_path": 0.0}) == presets(preset).config.vision.but(**{"body.drop_path": 0.0})
    assert layout.write(presets(preset).config)["model_cfg"] == {**config, "custom_text": True}


def test_what_the_layouts_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match="grid of 16"):
        eva_clip.weights["official"].write(preset_of("eva_clip").config.but(**{"text.end": None, "text.body.block.mlp.act": "gelu"}))
    with pytest.raises(UserError, match="published towers only"):
        eva_clip.weights["open_clip"].write(presets("b_16").config.but(**{"vision.body.depth": 3}))
    with pytest.raises(UserError, match="not one of EVA"):
        eva_clip.weights["open_clip"].read({"model_cfg": {"embed_dim": 8, "vision_cfg": {"timm_model_name": "vit_base"}, "text_cfg": {}}}, {})
