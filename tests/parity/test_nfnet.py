"""NFNet through timm's files and back (DeepMind's variant: SAME padding, gains, SkipInit). Random weights, toy widths, tolerance 1e-4."""
import json

import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.backbone import nfnet
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import import_


def small():
    timm, models = reference("timm"), reference("timm.models.nfnet")
    assert timm
    plan = models.model_cfgs["dm_nfnet_f0"]
    from dataclasses import replace
    plan = replace(plan, depths=(1, 2, 1, 1), channels=(32, 32, 64, 64), stem_chs=32, group_size=8, num_features=96)
    return shake(models.NormFreeNet(plan, num_classes=5))


@torch.no_grad()
def test_timm_nfnet_in_and_out(tmp_path):
    theirs = small()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    published = {"test_input_size": [3, 64, 64], "crop_mode": "squash"}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "dm_nfnet_f0", "pretrained_cfg": published}))
    ours, preset = import_(tmp_path, nfnet.weights["timm"], lambda name: preset_of("nfnet", name))
    assert preset.feed.image.size == 64 and preset.feed.image.fit == "squash"
    for size in (64, 70):                                                  # an odd border lies below and at the right
        image, label = torch.randn(2, 3, size, size), torch.tensor([0, 4])
        maps = theirs.forward_intermediates(image, intermediates_only=True)[1:]
        logits, got = theirs(image), ours.backbone.features(image)
        assert_agree({**{f"stage {s}": got[s] for s in range(3)}, "logits": ours.classify(image),
                 "feature": ours.backbone(image).pooled, "loss": ours.losses({"image": image, "label": label})["label"]},
                {**{f"stage {s}": maps[s] for s in range(3)}, "logits": logits,
                 "feature": theirs.forward_head(theirs.forward_features(image), pre_logits=True),
                 "loss": F.cross_entropy(logits, label, label_smoothing=0.1)})
    back = nfnet.weights["timm"].keymap(preset.config).save(ours.state_dict())
    assert all(torch.equal(v, back[k]) for k, v in theirs.state_dict().items()) and len(back) == len(theirs.state_dict())


def test_published_sizes_and_other_networks():
    timm = reference("timm")
    layout = nfnet.weights["timm"]
    for name, preset in (("dm_nfnet_f0", "f0"), ("dm_nfnet_f6", "paper")):
        with torch.device("meta"):
            state, ours = timm.create_model(name).state_dict(), preset_of("nfnet", preset).config.build().state_dict()
        config = preset_of("nfnet", preset).config
        assert {k: v.shape for k, v in layout.keymap(config).load(state).items()} == {k: v.shape for k, v in ours.items()}
        assert layout.write(config)["architecture"] == name
        assert preset_of("nfnet", "f0").but(**layout.read(layout.write(config), state)[1]).config.backbone.layers == config.backbone.layers
    with torch.device("meta"):
        other = timm.create_model("nfnet_f0").state_dict()
    with pytest.raises(UserError, match="dm_nfnet"):
        layout.read({}, other)
    with pytest.raises(UserError, match="F0 to F6"):
        layout.write(preset_of("nfnet").config)
