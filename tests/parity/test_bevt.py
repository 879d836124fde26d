"""BEVT's trunk against torchvision's SwinTransformer3d: the maps of the last two stages and the loss of a head on them; its released names with the
ways out written out on their tensors; through files, both ways."""
import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.objectives.codes import masked_ce
from polysense.systems.selfsup import bevt
from polysense.weights.convert import export, import_
from polysense.weights.files import read_state


def presets(name):
    """The published one with a small window (no shape shows it) and a small tokenizer."""
    return preset_of("bevt", name).but(**{"config.encoder.window": (3, 2, 2), "config.target": preset_of("bevt", "tiny").config.target})


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


def released(theirs):
    """A file as the authors write it: torchvision's trunk under Video Swin's own names (the halving at the end of a stage, `mlp.fc1`, everything
    below `backbone.`), and what BEVT has beside it at random."""
    named, g = {}, torch.Generator().manual_seed(4)
    for key, value in theirs.state_dict().items():
        part = key.split(".")
        if part[0] == "features":
            n = int(part[1])
            rest = ".".join(part[2:]) if n % 2 else ".".join(part[3:]).replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2")
            named[f"backbone.layers.{n // 2}.{'downsample' if n % 2 else f'blocks.{part[2]}'}.{rest}"] = value.contiguous()
        elif part[0] != "head":
            named[f"backbone.{key}"] = value.contiguous()
    for name, shape in (("patch_embed_2d.proj", (12, 3, 4, 4)), ("fpn.0", (48, 48, 2, 2)), ("lm_down", (48, 72)), ("fpn_s.0", (48, 48, 1, 2, 2)),
                        ("lm_down_st.0", (48, 72)), ("fpn_t.0", (48, 48, 2, 1, 1))):
        named[f"backbone.{name}.weight"], named[f"backbone.{name}.bias"] = torch.randn(shape, generator=g) * 0.1, torch.randn(shape[0], generator=g)
    named |= {f"backbone.patch_embed_2d.norm.{p}": torch.randn(12, generator=g) for p in ("weight", "bias")}
    return named | {"backbone.mask_token": torch.randn(1, 1, 12, generator=g), "cls_head.lm_head.weight": torch.randn(64, 48, generator=g),
                    "cls_head.lm_head.bias": torch.randn(64, generator=g)}


@torch.no_grad()
def test_mmactions_names_say_the_same_up_to_the_codes_of_every_frame(tmp_path):
    theirs = theirs_of()
    s = released(theirs)
    save_file(s | {"cls_head.vae_encoder.blocks.input.w": torch.zeros(1)}, tmp_path / "bevt.safetensors")
    ours, preset = import_(tmp_path / "bevt.safetensors", bevt.weights["mmaction"], presets)
    video, mask = torch.randn(1, 4, 3, 32, 32), torch.rand(1, 2, 4, 4) < 0.5
    for a, b in zip(ours.eval().encoder.features(video), maps(theirs, video), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    fine = mask.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., None]
    theirs.patch_embed.register_forward_hook(lambda m, args, out: torch.where(fine, s["backbone.mask_token"], out))
    before, last = (x.permute(0, 4, 1, 2, 3) for x in maps(theirs, video)[-2:])
    grown = F.conv_transpose3d(last, s["backbone.fpn_s.0.weight"], s["backbone.fpn_s.0.bias"], stride=(1, 2, 2))
    x = F.linear(torch.cat([before, grown], 1).permute(0, 2, 3, 4, 1), s["backbone.lm_down_st.0.weight"], s["backbone.lm_down_st.0.bias"])
    x = F.conv_transpose3d(x.permute(0, 4, 1, 2, 3), s["backbone.fpn_t.0.weight"], s["backbone.fpn_t.0.bias"], stride=(2, 1, 1))
    x = F.layer_norm(x.permute(0, 2, 3, 4, 1), (48,), s["backbone.norm.weight"], s["backbone.norm.bias"])
    want = F.linear(x, s["cls_head.lm_head.weight"], s["cls_head.lm_head.bias"])
    got = ours.name_clip(video, mask)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    ids, every = torch.randint(64, (1, 4, 4, 4)), mask.repeat_interleave(2, 1)
    torch.testing.assert_close(masked_ce(got, ids, every), F.cross_entropy(want[every], ids[every]), rtol=0, atol=1e-4)
    export(ours.state_dict(), preset.config, bevt.weights["mmaction"], tmp_path / "back.safetensors")
    back = read_state(tmp_path / "back.safetensors")
    held = {k: v for k, v in s.items() if "position_index" not in k}
    assert back.keys() == held.keys() and all(torch.equal(back[k], v) for k, v in held.items())


@torch.no_grad()
def test_a_video_swin_under_the_same_names_lends_its_trunk_and_others_are_refused(tmp_path):
    theirs = theirs_of()
    s = released(theirs)
    trunk = {k: v for k, v in s.items() if k.startswith(("backbone.layers.", "backbone.patch_embed.", "backbone.norm."))}
    save_file(trunk | {"cls_head.fc_cls.weight": torch.zeros(5, 48)}, tmp_path / "swin.safetensors")
    ours, _ = import_(tmp_path / "swin.safetensors", bevt.weights["mmaction"], presets)
    video = torch.randn(1, 4, 3, 32, 32)
    torch.testing.assert_close(theirs.head(ours.eval().encoder(video).pooled), theirs(video.transpose(1, 2)), rtol=1e-4, atol=1e-4)
    save_file({**s, "backbone.fpn_t.0.weight": torch.zeros(48, 48, 2, 2, 2)}, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="cannot pass thin34"):
        import_(tmp_path / "wide.safetensors", bevt.weights["mmaction"], presets)
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not bevt"):
        import_(tmp_path / "x.safetensors", bevt.weights["mmaction"], presets)
