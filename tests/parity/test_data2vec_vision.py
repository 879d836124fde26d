"""data2vec for pictures against transformers' Data2VecVisionModel: all hidden states, with and without a mask; through files, both ways."""
import pytest
import torch
from reference import reference, shake

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.selfsup import data2vec_vision
from polysense.weights.convert import export, import_

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32, "patch_size": 8,
         "layer_scale_init_value": 0.1, "use_mask_token": True, "use_shared_relative_position_bias": True, "use_relative_position_bias": False}


def presets(name):
    return preset_of("data2vec_vision", name)


@torch.no_grad()
def assert_agree(ours, model, image, mask):
    for fill in (None, mask):
        want = model(image, bool_masked_pos=fill, output_hidden_states=True).hidden_states
        x = ours.encoder.embed(image, fill=None if fill is None else (fill, ours.hide.token))[0]
        for a, b in zip(ours.encoder.body.layers(x), want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_transformers_in_and_out(tmp_path):
    hf = reference("transformers")
    model = shake(hf.Data2VecVisionModel(hf.Data2VecVisionConfig(**SIZES)))
    image, mask = torch.randn(2, 3, 32, 32), torch.rand(2, 16) < 0.5
    model.save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", data2vec_vision.weights["hf"], presets)
    assert_agree(ours, model, image, mask)
    assert preset.config.sampler.hidden == round(120 / 196 * 16) and preset.config.target.top == 3
    ours.after_start()                                       # the average, which is not published, begins as the model
    held = model(image, output_hidden_states=True).hidden_states[1:]
    normed = torch.stack([torch.nn.functional.layer_norm(x[:, 1:], (32,)) for x in held]).mean(0)
    torch.testing.assert_close(ours.target.whole(image), torch.nn.functional.layer_norm(normed, (32,)), rtol=0, atol=1e-4)
    export(ours.state_dict(), preset.config, data2vec_vision.weights["hf"], tmp_path / "back", preset.feed)
    assert_agree(ours, hf.Data2VecVisionModel.from_pretrained(tmp_path / "back").eval(), image, mask)


def test_a_model_with_a_head_on_one_shared_table_is_read_and_others_are_refused(tmp_path):
    hf = reference("transformers")
    model = shake(hf.Data2VecVisionModel(hf.Data2VecVisionConfig(**{**SIZES, "use_shared_relative_position_bias": False,
                                                                   "use_relative_position_bias": True})))
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(UserError, match=r"data2vec_vision in the layout|share"):
        import_(tmp_path / "own", data2vec_vision.weights["hf"], presets)
    with pytest.raises(UserError, match="BEiT's tower only"):
        data2vec_vision.weights["hf"].write(preset_of("data2vec_vision", "tiny").but(**{"config.encoder.pool": "cls"}).config)
