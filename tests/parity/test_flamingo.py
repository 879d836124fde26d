"""Flamingo against transformers' Idefics: resampler, gated layer, logits and loss; through files, both ways; toy sizes."""
import pytest
import torch
from reference import reference, shake

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.objectives.language import IGNORE, next_token
from polysense.weights import idefics_hf
from polysense.weights.convert import export, import_

V = 60                                        # words of the language model; Idefics adds two: one around pictures, one for a picture


def config(transformers, **more):
    return transformers.IdeficsConfig(**{
        "vocab_size": V, "additional_vocab_size": 2, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
        "cross_layer_interval": 2, "qk_layer_norms": True, "alpha_type": "vector", "alpha_initializer": "zeros", "max_position_embeddings": 64,
        "tie_word_embeddings": False, "pad_token_id": 0, "use_resampler": True, "hidden_act": "silu", "dropout": 0.0, "rms_norm_eps": 1e-6,
        "vision_config": {"embed_dim": 24, "image_size": 16, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 3,
                          "intermediate_size": 40, "hidden_act": "gelu"},
        "perceiver_config": {"resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 8,
                             "qk_layer_norms_perceiver": True}, **more})


@pytest.fixture(params=[{}, {"alpha_type": "float", "qk_layer_norms": False, "additional_vocab_size": 0, "cross_layer_interval": 1}],
                ids=["as idefics-9b", "plain"])
def pair(request, tmp_path):
    transformers = reference("transformers")
    torch.manual_seed(0)
    theirs = shake(transformers.IdeficsForVisionText2Text(config(transformers, **request.param)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", idefics_hf.LAYOUT, lambda name: preset_of("flamingo", name))
    return ours, theirs, preset, tmp_path


def example(ours):
    """Two texts with two pictures each, one that begins without; and which picture each token sees."""
    place = ours.image_token
    text = torch.tensor([[1, place, 5, 6, 2, place, 7, 8], [1, 9, place, 10, 2, place, 11, 0]])
    image = torch.randn(2, 2, 3, 16, 16)
    number = (text == place).cumsum(1)
    return text, image, torch.stack([number == 1, number == 2], -1)


@torch.no_grad()
def test_features_logits_and_loss(pair):
    ours, theirs, _, _ = pair
    text, image, looks = example(ours)
    mask = text != 0
    label = text.masked_fill(~mask, IGNORE)
    want = theirs(input_ids=text, attention_mask=mask.long(), pixel_values=image, image_attention_mask=looks.long())
    assert (ours.see(image) - want.image_hidden_states).abs().max() <= 1e-4
    got = ours.predict(image, text)
    assert (got - want.logits)[mask].abs().max() <= 1e-4
    # their own loss fails on added words; it is this
    plain = torch.nn.functional.cross_entropy(want.logits[:, :-1].flatten(0, 1), label[:, 1:].flatten(), ignore_index=IGNORE)
    assert abs(next_token(got, label) - plain) <= 1e-4


@torch.no_grad()
def test_resampler_and_gated_layer_alone(pair):
    ours, theirs, _, _ = pair
    x = torch.randn(2, 7, 24)
    assert (ours.resampler(x) - theirs.model.perceiver_resampler(x)).abs().max() <= 1e-4
    y, source, see = torch.randn(2, 6, 32), torch.randn(2, 5, 24), torch.rand(2, 6, 5) > 0.5
    see[0, 0] = False
    bias = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)[:, None]
    want = theirs.model.gated_cross_attn_layers[0](y, None, source, image_attention_mask=bias, cross_attention_gate=see.any(-1).float())
    assert (ours.language.body.blocks[0].look(y, source, see) - want).abs().max() <= 1e-4


@torch.no_grad()
def test_ours_opens_in_transformers(pair):
    ours, theirs, preset, place = pair
    export(dict(ours.state_dict()), preset.config, idefics_hf.LAYOUT, place / "ours", preset.feed)
    back = reference("transformers").IdeficsForVisionText2Text.from_pretrained(place / "ours").eval()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name
    text, image, looks = example(ours)
    mask = text != 0
    out = back(input_ids=text, attention_mask=mask.long(), pixel_values=image, image_attention_mask=looks.long()).logits
    assert (ours.predict(image, text) - out)[mask].abs().max() <= 1e-4


def test_what_the_layout_cannot_hold_is_refused():
    with pytest.raises(UserError, match="Idefics"):
        idefics_hf.write(preset_of("flamingo").config)
    with pytest.raises(UserError, match="not 'idefics'"):
        idefics_hf.read({"model_type": "clip"}, {})
    with pytest.raises(UserError, match="resampler"):
        idefics_hf.read({"model_type": "idefics", "use_resampler": False}, {})
