"""EVA and its fine-tuned form against timm's Eva; its authors' and timm's names in and out."""
import json

import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import load_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.masking import masking_of
from polysense.systems.selfsup import eva
from polysense.weights.convert import export, import_


@torch.no_grad()
def test_authors_names_in_and_out_and_tokens_are_timms(tmp_path):
    timm = reference("timm")
    model = shake(timm.models.eva.Eva(img_size=64, patch_size=16, embed_dim=64, depth=2, num_heads=1, mlp_ratio=2.0, qkv_bias=True, qkv_fused=True,
                                      num_classes=0, use_rot_pos_emb=False, use_abs_pos_emb=True, global_pool="token"))
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("k_bias")}
    assert all(not k.endswith("k_bias") or not v.any() for k, v in model.state_dict().items()), "keys have no bias"
    state |= {"mask_token": torch.randn(1, 1, 64), "lm_head.weight": torch.randn(24, 64), "lm_head.bias": torch.randn(24)}
    torch.save({"module": state}, tmp_path / "eva.pt")
    ours, preset = import_(tmp_path / "eva.pt", eva.weights["baai"], lambda name: preset_of("eva", name).but(
        **{"config.target.tower.body.depth": 1, "config.target.tower.body.width": 64, "config.target.head.into": 64}))
    image, mask = torch.randn(2, 3, 64, 64), torch.rand(2, 16) < 0.4
    torch.testing.assert_close(ours.encoder(image).tokens, model.forward_features(image), rtol=0, atol=1e-4)
    model.patch_embed.register_forward_hook(lambda m, args, out: torch.where(mask[..., None], state["mask_token"], out))
    want = F.linear(model.forward_features(image)[:, 1:], state["lm_head.weight"], state["lm_head.bias"])[mask]
    masking = masking_of(mask)
    torch.testing.assert_close(ours.decoder(ours.see(image, masking), masking), want, rtol=0, atol=1e-4)
    assert preset.config.target.width == 24 and preset.config.sampler.hidden == round(105 / 16)
    export(ours.state_dict(), preset.config, eva.weights["baai"], tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in back.items())


def fine_tuned(timm, heads=1):
    """timm's class as `eva_giant_patch14_*` builds it: the mean of the patches, a norm, a dense layer."""
    return shake(timm.create_model("eva_giant_patch14_336.m30m_ft_in22k_in1k", img_size=64, patch_size=16, embed_dim=64, depth=2, num_heads=heads,
                                   mlp_ratio=2.0, num_classes=5))


def presets(name):
    return preset_of("eva", name)


@torch.no_grad()
def agree(ours, model, image):
    torch.testing.assert_close(ours.classify(image), model(image), rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.backbone(image).pooled, model.forward_features(image)[:, 1:].mean(1), rtol=0, atol=1e-4)
    label = torch.tensor([0, 4])
    want = F.cross_entropy(model(image), label, label_smoothing=0.3)
    torch.testing.assert_close(ours.losses({"image": image, "label": label})["label"], want, rtol=0, atol=1e-4)


def test_authors_fine_tuned_file_in_and_out(tmp_path):
    model = fine_tuned(reference("timm"))
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("k_bias")}
    assert "fc_norm.weight" in state and "norm.weight" not in state
    torch.save({"model": state}, tmp_path / "eva.pt")
    ours, preset = import_(tmp_path / "eva.pt", eva.weights["baai_classifier"], presets)
    agree(ours, model, torch.randn(2, 3, 64, 64))
    assert ours.backbone.body.blocks[0].attn.k.bias is None and preset.config.mix.classes == preset.config.head.out == 5
    assert (preset.feed.image.size, preset.feed.image.fit) == (64, "squash")
    export(ours.state_dict(), preset.config, eva.weights["baai_classifier"], tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in back.items())


def test_timms_fine_tuned_models_in_and_out(tmp_path):
    timm, image = reference("timm"), torch.randn(2, 3, 64, 64)
    model = fine_tuned(timm, heads=4)
    reference("timm.models._hub").save_for_hf(model, str(tmp_path / "theirs"), safe_serialization=True)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config["model_args"] = {**config.get("model_args", {}), "num_heads": 4}           # what timm records of the arguments differs by version
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    ours, preset = import_(tmp_path / "theirs", eva.weights["timm"], presets)
    agree(ours, model, image)
    assert (preset.feed.image.mean, preset.feed.image.fit, preset.feed.image.size) == ((0.485, 0.456, 0.406), "squash", 64)
    export(ours.state_dict(), preset.config, eva.weights["timm"], tmp_path / "back", preset.feed)
    again = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    agree(ours, again, image)
    assert import_(tmp_path / "back", eva.weights["timm"], presets)[1] == preset


@pytest.mark.parametrize("name, preset", [("eva_giant_patch14_336.m30m_ft_in22k_in1k", "finetune"),
                                          ("eva_giant_patch14_560.m30m_ft_in22k_in1k", "finetune_560"),
                                          ("eva_giant_patch14_224.clip_ft_in1k", "clip_finetune")])
def test_timms_published_models_are_our_presets(name, preset):
    timm = reference("timm")
    with torch.device("meta"):
        model = timm.create_model(name, depth=2)             # of forty that are alike
        known = preset_of("eva", preset).but(**{"config.backbone.body.depth": 2})
        ours = known.config.build()
    published = {k: v for k, v in model.pretrained_cfg.items() if k in ("mean", "std", "interpolation", "input_size", "crop_mode")}
    layout = eva.weights["timm"]
    found, overrides = layout.read({"architecture": name.split(".")[0], "pretrained_cfg": published}, model.state_dict())
    read = preset_of("eva", found).but(**overrides)
    assert read.config == known.config and read.feed.image == known.feed.image
    shapes = {k: v.shape for k, v in layout.keymap(read.config).load(model.state_dict()).items()}
    assert shapes == {k: v.shape for k, v in ours.state_dict().items()}


def test_a_file_of_the_other_kind_is_refused_and_told_its_layout(tmp_path):
    q = {"blocks.0.attn.q_bias": torch.zeros(4)}
    for layout, state, says in (("baai", {}, "read it as eva/baai_classifier"),
                                ("baai_classifier", {"lm_head.weight": torch.zeros(4, 4)}, "as eva/baai"),
                                ("timm", {"norm.weight": torch.zeros(4), "head.weight": torch.zeros(4, 4)}, "a whole EVA-CLIP as eva_clip"),
                                ("timm", {"blocks.0.mlp.fc1_g.weight": torch.zeros(4, 4)}, "EVA-02")):
        torch.save({"module": q | state}, tmp_path / "eva.pt")
        with pytest.raises(UserError, match=says):
            import_(tmp_path / "eva.pt", eva.weights[layout], presets)


def test_a_classifier_that_theirs_does_not_compute_is_not_written():
    config = preset_of("eva", "finetune").config
    for layout in ("baai_classifier", "timm"):
        with pytest.raises(UserError, match="behind the mean"):
            eva.weights[layout].write(config.but(**{"backbone.pool": "cls"}))
        with pytest.raises(UserError, match="eps"):
            eva.weights[layout].write(config.but(**{"head.eps": 1e-5}))
    with pytest.raises(UserError, match="heads 64 wide"):
        eva.weights["baai_classifier"].write(config.but(**{"backbone.body.heads": 22}))
