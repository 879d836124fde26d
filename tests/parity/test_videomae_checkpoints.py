"""VideoMAE through published files and back: transformers' pre-training and classification forms. Random weights, toy sizes, tolerance 1e-4."""
import json

import pytest
import torch
from reference import reference, shake
from safetensors.torch import load_file, save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.mechanisms.mask_sampler import masking_of
from polysense.objectives.masked import masked_mse
from polysense.systems.selfsup import videomae
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

LAYOUT = videomae.weights["hf"]
SIZES = {"image_size": 16, "patch_size": 8, "num_frames": 4, "tubelet_size": 2, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "decoder_hidden_size": 24, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4,
         "decoder_intermediate_size": 40}


def presets(name: str):
    return preset_of("videomae", name)


def published(state: dict) -> dict:
    """Biases as the hub's files have them."""
    return {k.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): v for k, v in state.items()}


@torch.no_grad()
def ours(system, video, mask):
    prediction, target = system.pairs(video, masking_of(mask))
    return {"logits": prediction, "loss": masked_mse(prediction, target)}


@torch.no_grad()
def theirs(model, video, mask):
    out = model(video, bool_masked_pos=mask)
    return {"logits": out.logits, "loss": out.loss}


@pytest.mark.parametrize("more", [{"use_mean_pooling": False}, {"norm_pix_loss": False, "layer_norm_eps": 1e-3}],
                         ids=["as published", "other values"])
def test_pre_training_in_and_out_under_both_sets_of_names(tmp_path, more):
    hf = reference("transformers")
    peer = shake(hf.VideoMAEForPreTraining(hf.VideoMAEConfig(**SIZES, **more)))
    peer.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    video = torch.randn(3, 4, 3, 16, 16)
    mask = videomae.TubeMask.Config(ratio=0.75).build()(3, (2, 2, 2)).mask
    want = theirs(peer, video, mask)
    for state in (load_file(file), published(load_file(file))):
        save_file(state, file)
        system, preset = import_(tmp_path / "theirs", LAYOUT, presets)
        assert_agree(ours(system, video, mask), want)
    export(system.state_dict(), preset.config, LAYOUT, tmp_path / "back", preset.feed)
    again, notes = hf.VideoMAEForPreTraining.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    assert_agree(theirs(again.eval(), video, mask), want)


def test_classifier_in_and_out(tmp_path):
    hf = reference("transformers")
    peer = shake(hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**SIZES, num_labels=5)))
    peer.save_pretrained(tmp_path / "theirs")
    system, preset = import_(tmp_path / "theirs", LAYOUT, presets)
    video = torch.randn(2, 4, 3, 16, 16)
    with torch.no_grad():
        want = {"logits": peer(video).logits, "feature": peer.videomae(video).last_hidden_state.mean(1)}
        assert_agree({"logits": system.classify_video(video), "feature": system.encoder(video).pooled}, want)
        export(system.state_dict(), preset.config, LAYOUT, tmp_path / "back", preset.feed)
        again = hf.VideoMAEForVideoClassification.from_pretrained(tmp_path / "back").eval()
        assert_agree({"logits": again(video).logits}, {"logits": want["logits"]})


@pytest.mark.parametrize("case", ["other model", "no config", "empty", "cut", "token"])
def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path, case):
    config = preset_of("videomae", "paper").config.but(**{
        "encoder.image_size": 32, "encoder.body": videomae.body(16, 1, 2), "decoder.body": videomae.body(16, 1, 2, last=1e-5)})
    export(config.build().state_dict(), config, LAYOUT, tmp_path / "good")
    file, about = tmp_path / "good" / "model.safetensors", tmp_path / "good" / "config.json"
    if case == "other model":
        about.write_text(json.dumps(json.loads(about.read_text()) | {"model_type": "vit"}))
    elif case == "no config":
        about.unlink()
    elif case == "empty":
        file.write_bytes(b"")
    elif case == "token":
        save_file(load_file(file) | {"classifier.weight": torch.zeros(3, 16)}, file)
    else:
        save_file({k: v for k, v in load_file(file).items() if "decoder.head" not in k}, file)
    with pytest.raises(UserError) as caught:
        import_(tmp_path / "good", LAYOUT, presets)
    assert "\n" not in str(caught.value)
