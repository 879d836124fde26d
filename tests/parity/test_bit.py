"""BiT, the tower of supervised pre-training, through transformers' and timm's files and back. Random weights, toy sizes, tolerance 1e-4."""
import json

import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.backbone import supervised
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_


def presets(name: str):
    return preset_of("supervised", name)


@torch.no_grad()
def test_transformers_in_and_out(tmp_path):
    hf = reference("transformers")
    theirs = shake(hf.BitForImageClassification(hf.BitConfig(
        embedding_size=8, hidden_sizes=[32, 64, 128], depths=[2, 1, 1], num_groups=4, num_labels=5)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", supervised.weights["hf"], presets)
    image, label = torch.randn(2, 3, 64, 64), torch.tensor([0, 4])

    def said(model) -> dict[str, torch.Tensor]:
        out = model(image, output_hidden_states=True)
        maps = out.hidden_states
        return {"stage 1": maps[1], "stage 2": maps[2], "feature": model.bit(image).pooler_output.flatten(1), "logits": out.logits,
                "loss": F.cross_entropy(out.logits, label)}
    maps = ours.backbone.features(image)
    assert_agree({"stage 1": maps[0], "stage 2": maps[1], "feature": ours.backbone(image).pooled, "logits": ours.classify(image),
             "loss": ours.losses({"image": image, "label": label})["label"]}, said(theirs))
    export(ours.state_dict(), preset.config, supervised.weights["hf"], tmp_path / "back", preset.feed)
    again = hf.BitForImageClassification.from_pretrained(tmp_path / "back").eval()
    assert_agree(said(again), said(theirs))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in theirs.state_dict().items())


@torch.no_grad()
def test_timm_in_and_out(tmp_path):
    reference("timm")
    models, std = reference("timm.models.resnetv2"), reference("timm.layers")
    from functools import partial
    theirs = shake(models.ResNetV2(layers=(1, 2, 1, 1), channels=(128, 256, 512, 1024), stem_chs=32, num_classes=5, stem_type="fixed",
                                   conv_layer=partial(std.StdConv2d, eps=1e-8)))
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnetv2_50x1_bit", "pretrained_cfg": {"input_size": [3, 64, 64]}}))
    ours, preset = import_(tmp_path, supervised.weights["timm"], presets)
    image = torch.randn(2, 3, 64, 64)
    assert_agree({"logits": ours.classify(image), "map": ours.backbone.features(image)[-1]},
            {"logits": theirs(image), "map": theirs.forward_features(image)})
    back = supervised.weights["timm"].keymap(preset.config).save(ours.state_dict())
    assert all(torch.equal(v, back[k]) for k, v in theirs.state_dict().items()) and len(back) == len(theirs.state_dict())


def test_published_sizes_and_other_models():
    timm = reference("timm")
    layout = supervised.weights["timm"]
    with torch.device("meta"):
        state = timm.create_model("resnetv2_101x3_bit", num_classes=21_843).state_dict()
        ours = preset_of("supervised", "paper").config.build().state_dict()
    config = preset_of("supervised", "paper").config
    assert {k: v.shape for k, v in layout.keymap(config).load(state).items()} == {k: v.shape for k, v in ours.items()}
    assert presets("paper").but(**layout.read(layout.write(config), state)[1]).config == config
    with pytest.raises(UserError, match="group norm"):
        layout.write(preset_of("supervised").config)
    with pytest.raises(UserError, match="BitForImageClassification"):
        supervised.weights["hf"].read({"model_type": "resnet"}, {})
