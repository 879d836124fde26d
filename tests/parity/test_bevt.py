"""BEVT's trunk against torchvision's SwinTransformer3d: the maps of the last two stages and the loss of a head on them; through files, both ways."""
import pytest
import torch
from reference import reference, shake
from safetensors.torch import save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.selfsup import bevt
from polysense.weights.convert import export, import_
from polysense.weights.files import read_state


def presets(name):
    """The published one with a small window (no shape shows it), a small tokenizer and small heads."""
    of = preset_of("bevt", "tiny").config
    return preset_of("bevt", name).but(**{"config.encoder.window": (3, 2, 2), "config.target": of.target, "config.decoder": of.decoder})


def theirs_of():
    reference("timm")                        # torchvision needs its operators declared
    module = reference("torchvision.models.video.swin_transformer")
    return shake(module.SwinTransformer3d(patch_size=[2, 4, 4], embed_dim=12, depths=[2, 2, 2], num_heads=[1, 2, 3], window_size=[3, 2, 2],
                                          num_classes=5))


def maps(theirs, video):
    """What each stage says, before the halving behind it."""
    x, out = theirs.patch_embed(video.transpose(1, 2)), []
    for i, layer in enumerate(theirs.features):
        x = layer(x)
        if i % 2 == 0:
            out.append(x)
    return out


@torch.no_grad()
@pytest.mark.parametrize("frames, side", [(8, 32), (4, 48)])
def test_maps_of_clips_and_files_both_ways(tmp_path, frames, side):
    theirs = theirs_of()
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "swin3d.safetensors")
    ours, preset = import_(tmp_path / "swin3d.safetensors", bevt.weights["torchvision"], presets)
    ours.eval()
    assert (preset.config.encoder.base, preset.config.encoder.depths, preset.config.encoder.heads) == (12, (2, 2, 2), (1, 2, 3))
    video = torch.randn(2, frames, 3, side, side)
    want, got = maps(theirs, video), ours.encoder.features(video)
    assert len(want) == len(got) == 3
    for a, b in zip(got[-2:], want[-2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs.head(ours.encoder(video).pooled), theirs(video.transpose(1, 2)), rtol=1e-4, atol=1e-4)
    export(ours.state_dict(), preset.config, bevt.weights["torchvision"], tmp_path / "back.safetensors")
    back = read_state(tmp_path / "back.safetensors")
    held = {k: v for k, v in theirs.state_dict().items() if not k.startswith("head.") and "position_index" not in k}
    assert back.keys() == held.keys() and all(torch.equal(back[k], v) for k, v in held.items())
    assert not theirs.load_state_dict(back, strict=False).unexpected_keys


@torch.no_grad()
def test_mmactions_names_say_the_same(tmp_path):
    """Video Swin's own names, as BEVT's files have them: the halving at the end of a stage, `mlp.fc1`, everything below `backbone.`."""
    theirs = theirs_of()
    named = {}
    for key, value in theirs.state_dict().items():
        part = key.split(".")
        if part[0] == "features":
            n = int(part[1])
            rest = ".".join(part[2:]) if n % 2 else ".".join(part[3:]).replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2")
            named[f"backbone.layers.{n // 2}.{'downsample' if n % 2 else f'blocks.{part[2]}'}.{rest}"] = value.contiguous()
        elif part[0] != "head":
            named[f"backbone.{key}"] = value.contiguous()
    named |= {"cls_head.lm_head.weight": torch.randn(64, 64), "cls_head.lm_head.bias": torch.randn(64)}
    save_file(named, tmp_path / "bevt.safetensors")
    ours, preset = import_(tmp_path / "bevt.safetensors", bevt.weights["mmaction"], presets)
    video = torch.randn(1, 4, 3, 32, 32)
    for a, b in zip(ours.eval().encoder.features(video), maps(theirs, video), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.decoder.classify.weight, named["cls_head.lm_head.weight"])
    export(ours.state_dict(), preset.config, bevt.weights["mmaction"], tmp_path / "back.safetensors")
    back = read_state(tmp_path / "back.safetensors")
    assert all(torch.equal(back[k], v) for k, v in named.items() if "position_index" not in k)
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not bevt"):
        import_(tmp_path / "x.safetensors", bevt.weights["mmaction"], presets)
