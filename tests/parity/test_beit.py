"""BEiT against transformers (masked model, classifier), timm (fine-tuning head) and the released names: through files, both ways."""
import re

import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import load_file, save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.masking import masking_of
from polysense.systems.selfsup import beit
from polysense.weights.convert import export, import_

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8,
         "layer_scale_init_value": 0.1, "use_mean_pooling": True, "vocab_size": 40}


def presets(name):
    """The paper's presets with a toy tokenizer: published files have none."""
    plan = preset_of("beit", name)
    return plan if name == "finetune" else plan.but(**{"config.target.codec.encoder.width": 8})


@pytest.fixture()
def image():
    return torch.randn(3, 3, 32, 32)


@pytest.fixture()
def masked():
    return torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < 0.4


def theirs(kind="BeitForMaskedImageModeling", **more):
    transformers = reference("transformers")
    pretrained = kind == "BeitForMaskedImageModeling"
    config = transformers.BeitConfig(**SIZES, use_mask_token=pretrained, use_shared_relative_position_bias=pretrained,
                                     use_relative_position_bias=not pretrained, **more)
    return shake(getattr(transformers, kind)(config))


@torch.no_grad()
def assert_agree(ours, model, image, masked):
    masking = masking_of(masked)
    tokens = ours.see(image, masking)
    label = torch.arange(int(masked.sum())) % 40
    want = model(image, bool_masked_pos=masked, labels=label)
    torch.testing.assert_close(ours.decoder.whole(tokens), want.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(F.cross_entropy(ours.decoder(tokens, masking), label), want.loss, rtol=0, atol=1e-4)


def old_names(key: str) -> str:
    """As the files on the hub, which transformers 4 wrote, name it."""
    key = key.replace("shared_position_bias.", "encoder.relative_position_bias.").replace("beit.layers.", "beit.encoder.layer.")
    if ".layer." not in key:
        return key
    for new, old in (("relative_position_bias.", "attention.attention.relative_position_bias."), ("attention.q_proj", "attention.attention.query"),
                     ("attention.k_proj", "attention.attention.key"), ("attention.v_proj", "attention.attention.value"),
                     ("attention.o_proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense")):
        key = key.replace(new, old)
    return key


@pytest.mark.parametrize("name", [lambda k: k, old_names], ids=["in memory", "published"])
def test_masked_model_in_and_out(tmp_path, image, masked, name):
    model = theirs()
    model.save_pretrained(tmp_path / "theirs")
    save_file({name(k): v for k, v in load_file(tmp_path / "theirs" / "model.safetensors").items()}, tmp_path / "theirs" / "model.safetensors")
    ours, preset = import_(tmp_path / "theirs", beit.weights["hf"], presets)
    assert_agree(ours, model, image, masked)
    assert preset.config.sampler.hidden == round(75 / 196 * 16) and preset.config.target.size == 32
    export(ours.state_dict(), preset.config, beit.weights["hf"], tmp_path / "back", preset.feed)
    again = type(model).from_pretrained(tmp_path / "back").eval()
    assert_agree(ours, again, image, masked)


def test_released_names_in_and_out(tmp_path, image, masked):
    model, state = theirs(layer_norm_eps=1e-6), {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^beit\.(layers\.(\d+)\.)?", lambda m: f"blocks.{m[2]}." if m[2] else "", key)
        for new, old in (("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("attention.o_proj", "attn.proj"), ("lambda_", "gamma_"),
                         ("attention.q_proj.bias", "attn.q_bias"), ("attention.v_proj.bias", "attn.v_bias"), ("layernorm", "norm"),
                         ("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("embeddings.", ""),
                         ("shared_position_bias", "rel_pos_bias")):
            key = key.replace(new, old)
        state[key] = value
    for i in range(2):
        state[f"blocks.{i}.attn.qkv.weight"] = torch.cat([state.pop(f"blocks.{i}.attention.{n}_proj.weight") for n in "qkv"])
    state["rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    save_file(state, tmp_path / "beit.safetensors")
    ours, preset = import_(tmp_path / "beit.safetensors", beit.weights["unilm"], presets)
    assert_agree(ours, model, image, masked)
    export(ours.state_dict(), preset.config, beit.weights["unilm"], tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(v, state[k]) for k, v in back.items()) and set(state) - set(back) == {"rel_pos_bias.relative_position_index"}


@torch.no_grad()
def test_classifier_in_and_out(tmp_path, image):
    model = theirs("BeitForImageClassification", num_labels=5)
    model.save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", beit.weights["hf_classifier"], presets)
    torch.testing.assert_close(ours.classify(image), model(image).logits, rtol=0, atol=1e-4)
    export(ours.state_dict(), preset.config, beit.weights["hf_classifier"], tmp_path / "back", preset.feed)
    again = type(model).from_pretrained(tmp_path / "back").eval()
    torch.testing.assert_close(again(image).logits, model(image).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_timms_fine_tuning_head(image):
    timm = reference("timm.models.beit")
    model = shake(timm.Beit(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2, num_classes=5, init_values=0.1,
                            use_rel_pos_bias=True, use_abs_pos_emb=False))
    base = beit.shared_bias(32, 8, 32, 2, 4, 0.1, 0.0)
    plan = beit.BEiTClassifier.Config(backbone=beit.finer(base, 0.0).but(**{"body.block.mlp.hidden": 64}),
                                      head=beit.NormLinear.Config(into=32, out=5))
    ours, state = plan.build().eval(), {}
    for key, value in model.state_dict().items():
        if key.endswith("relative_position_index") or "k_bias" in key:
            continue
        for new, old in ((r"^cls_token", "backbone.cls"), (r"^patch_embed\.proj", "backbone.patch"), (r"^blocks", "backbone.body.blocks"),
                         (r"^fc_norm", "head.norm"), (r"^head\.(weight|bias)", r"head.out.\1"), (r"mlp\.fc1", "mlp.up"), (r"mlp\.fc2", "mlp.down"),
                         (r"attn\.proj", "attn.out"), (r"gamma_", "scale"), (r"attn\.([qv])_bias", r"attn.\1.bias"),
                         (r"relative_position_bias_table", "relative.table")):
            key = re.sub(new, old, key)
        if "qkv" in key:
            state |= {key.replace("qkv", n): v for n, v in zip("qkv", value.chunk(3), strict=True)}
        else:
            state[key] = value
    ours.load_state_dict(state)
    torch.testing.assert_close(ours.classify(image), model(image), rtol=0, atol=1e-4)


def test_a_beit_of_another_kind_is_refused(tmp_path):
    transformers = reference("transformers")
    model = transformers.BeitForMaskedImageModeling(transformers.BeitConfig(**SIZES, use_mask_token=True, use_absolute_position_embeddings=True,
                                                                            use_shared_relative_position_bias=True))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="absolute positions"):
        import_(tmp_path, beit.weights["hf"], presets)
