"""VLMo's released layout in and out; its path for pictures against timm's BEiT with the weights of the first stage."""
import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import load_file, save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.selfsup import vlmo
from polysense.weights.convert import export, import_

WIDE, HEADS, DEPTH, PATCH, SIDE, VOCAB, REACH = 32, 2, 3, 8, 4, 120, 196
OWN = (2 * SIDE - 1) ** 2 + 3


def presets(name):
    """The paper's presets with a toy tokenizer: published files have none."""
    return preset_of("vlmo", name).but(**{"config.target.codec.encoder.width": 8, "config.target.codec.encoder.codes": 64})


def beit():
    timm = reference("timm.models.beit")
    return shake(timm.Beit(img_size=SIDE * PATCH, patch_size=PATCH, embed_dim=WIDE, depth=DEPTH, num_heads=HEADS, mlp_ratio=4, num_classes=0,
                           init_values=0.1, use_rel_pos_bias=True, use_abs_pos_emb=False, global_pool="token"))


def released(model):
    """A file as the authors write it: a BEiT's weights for pictures as their second stage takes them over, all else at random."""
    state, g = {}, torch.Generator().manual_seed(2)
    tables = []
    for key, value in model.state_dict().items():
        if key.endswith("relative_position_bias_table"):
            tables.append(value)
        elif not key.endswith(("relative_position_index", "k_bias")):
            state["transformer." + key.replace("mlp.", "mlp_imag.").replace("norm2", "norm2_imag")] = value
    state["relative_position_bias_table"] = torch.cat([torch.cat(tables, 1), torch.randn(2 + 2 * REACH, DEPTH * HEADS, generator=g)])

    def dense(name, out, into, *more):
        state[f"{name}.weight"] = torch.randn(out, into, generator=g) * 0.1
        for part in more:
            state[f"{name}.{part}"] = torch.randn(out, generator=g) * 0.1

    def norm(name):
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.rand(WIDE, generator=g) + 0.5, torch.randn(WIDE, generator=g)

    for i in range(DEPTH):
        for kind in ("text", "vl") if i == DEPTH - 1 else ("text",):
            dense(f"transformer.blocks.{i}.mlp_{kind}.fc1", 4 * WIDE, WIDE, "bias")
            dense(f"transformer.blocks.{i}.mlp_{kind}.fc2", WIDE, 4 * WIDE, "bias")
            norm(f"transformer.blocks.{i}.norm2_{kind}")
    state["token_type_embeddings.weight"] = torch.zeros(2, WIDE)
    for name, rows in (("word", VOCAB), ("position", 40), ("token_type", 2)):
        state[f"text_embeddings.{name}_embeddings.weight"] = torch.randn(rows, WIDE, generator=g)
    norm("text_embeddings.LayerNorm")
    norm("mlm_score.transform.LayerNorm")
    dense("pooler.dense", WIDE, WIDE, "bias")
    dense("itm_score.fc", 2, WIDE, "bias")
    dense("mlm_score.transform.dense", WIDE, WIDE, "bias")
    dense("mlm_score.decoder", VOCAB, WIDE)
    state["mlm_score.bias"] = torch.randn(VOCAB, generator=g)
    for name in ("itc_text_proj", "itc_image_proj", "itc_vl_text_proj", "itc_vl_image_proj"):
        dense(f"{name}.fc", WIDE, WIDE)
    return state | {"logit_scale": torch.tensor(2.5), "logit_vl_scale": torch.tensor(2.0)}


@pytest.fixture(scope="module")
def model():
    return beit()


@torch.no_grad()
def test_the_image_path_is_timms_beit_and_the_released_file_goes_in_and_out(tmp_path, model):
    state, image = released(model), torch.randn(3, 3, SIDE * PATCH, SIDE * PATCH)
    save_file({k: v.contiguous() for k, v in state.items()} | {"text_embeddings.position_ids": torch.arange(40)[None]}, tmp_path / "vlmo.safetensors")
    ours, preset = import_(tmp_path / "vlmo.safetensors", vlmo.weights["unilm"], presets)
    net = preset.config.net
    assert (net.body.fused, net.body.depth, net.body.heads, net.text.vocab, preset.config.target.size) == (1, DEPTH, HEADS, VOCAB, 8 * SIDE)
    tokens = ours.net(image).image
    torch.testing.assert_close(tokens, model.forward_features(image), rtol=0, atol=1e-4)
    want = F.normalize(model.forward_features(image)[:, 0] @ state["itc_image_proj.fc.weight"].T, dim=-1)
    torch.testing.assert_close(ours.encode_image(image), want, rtol=0, atol=1e-4)
    text = torch.tensor([[1, 7, 8, 9, 2]])
    assert ours.guess_words(text, text == 8).shape == (1, VOCAB) and float(ours.log_scale) == 2.5
    export(ours.state_dict(), preset.config, vlmo.weights["unilm"], tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(v, state[k]) for k, v in back.items()) and set(state) - set(back) == {"text_embeddings.position_embeddings.weight"}


def test_another_picture_size_interpolates_the_tables(model, tmp_path):
    save_file({k: v.contiguous() for k, v in released(model).items()}, tmp_path / "vlmo.safetensors")
    ours, preset = import_(tmp_path / "vlmo.safetensors", vlmo.weights["unilm"], presets)
    larger = preset.config.net.but(**{"image.size": 6 * PATCH, "body.relative.grid": (6, 6)}).build()
    table = ours.net.body.relative.table
    assert larger.body.relative.adapt("table", table).shape == larger.body.relative.table.shape
    assert torch.equal(larger.body.relative.adapt("table", table)[-(2 + 2 * REACH):], table[-(2 + 2 * REACH):])


def test_a_vlmo_of_another_kind_is_refused(tmp_path, model):
    state = released(model)
    del state["relative_position_bias_table"]
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "plus.safetensors")
    with pytest.raises(UserError, match="base plus"):
        import_(tmp_path / "plus.safetensors", vlmo.weights["unilm"], presets)
    with pytest.raises(UserError, match="cannot hold"):
        export({}, preset_of("vlmo").config, vlmo.weights["unilm"], tmp_path / "out.safetensors")
