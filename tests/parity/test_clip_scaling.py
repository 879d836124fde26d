"""The chunked two-pass computation against open_clip's loss on the whole batch, and LAION's layout both ways."""
import json
from contextlib import nullcontext

import pytest
import torch
from reference import reference, shake
from safetensors.torch import save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.align import clip_scaling
from polysense.train.gradients import Call, backward
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

CFG = {"embed_dim": 24, "quick_gelu": False,
       "vision_cfg": {"layers": 2, "width": 64, "head_width": 32, "image_size": 32, "patch_size": 8, "mlp_ratio": 3},
       "text_cfg": {"context_length": 12, "vocab_size": 100, "width": 64, "heads": 2, "layers": 2}}


def presets(name: str):
    return preset_of("clip_scaling", name)


def opened(folder):
    torch.manual_seed(0)
    model = shake(reference("open_clip").CLIP(**CFG))
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CFG}))
    return model, *import_(folder, clip_scaling.weights["open_clip"], presets)


def given():
    text = torch.randint(3, 98, (9, 12), generator=torch.Generator().manual_seed(2))
    text[:, -1] = 99
    return {"image": torch.randn(9, 3, 32, 32), "text": text}


@pytest.mark.parametrize("chunk", [2, 4, 9])
def test_loss_and_gradients_in_chunks_are_open_clips_on_the_whole_batch(chunk, tmp_path):
    model, ours, preset = opened(tmp_path)
    batch = given()
    loss = reference("open_clip.loss").ClipLoss()(*model(batch["image"], batch["text"])[:2], model.logit_scale.exp())
    loss.backward()
    stage = preset.stages[0].but(chunk=chunk, batch_size=9, precision="fp32", checkpoint_activations=False)
    losses, _ = backward(Call(ours), stage, batch, lambda on: nullcontext())
    grads = clip_scaling.weights["open_clip"].keymap(preset.config).save({n: p.grad for n, p in ours.named_parameters()})
    theirs = {n: p.grad for n, p in model.named_parameters()}
    assert grads.keys() == theirs.keys()
    assert_agree({"loss": losses["contrast"]} | grads, {"loss": loss.detach()} | theirs)


@torch.no_grad()
def test_laions_files_in_and_out(tmp_path):
    model, ours, preset = opened(tmp_path)
    batch = given()
    assert_agree({"image": ours.encode_image(batch["image"]), "text": ours.encode_text(batch["text"])},
            {"image": model.encode_image(batch["image"], normalize=True), "text": model.encode_text(batch["text"], normalize=True)})
    export(ours.state_dict(), preset.config, clip_scaling.weights["open_clip"], tmp_path / "back", preset.feed)
    again = import_(tmp_path / "back", clip_scaling.weights["open_clip"], presets)[0]
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize(("preset", "name"), [("vit_b_32", "ViT-B-32"), ("vit_h_14", "ViT-H-14"), ("paper", "ViT-g-14")])
def test_sizes_are_open_clips(preset, name):
    cfg = reference("open_clip").get_model_config(name)
    with torch.device("meta"):
        theirs = reference("open_clip").CLIP(**cfg)
        ours = presets(preset).config.build()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_what_is_no_vit_is_refused():
    with pytest.raises(UserError, match="ResNet tower"):
        clip_scaling.weights["open_clip"].read({"model_cfg": CFG | {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8}}}, {})
