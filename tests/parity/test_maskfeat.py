"""MaskFeat's backbones against timm's ViT and torchvision's MViT, and PySlowFast's names in and out."""
import re

import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import load_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.masking import masking_of
from polysense.systems.selfsup import maskfeat
from polysense.towers.mvit import PooledAttention
from polysense.weights.convert import export, import_


@torch.no_grad()
def test_slowfast_names_in_and_out_and_the_backbone_is_timms(tmp_path):
    timm = reference("timm")
    model = shake(timm.models.vision_transformer.VisionTransformer(img_size=64, patch_size=16, embed_dim=64, depth=2, num_heads=1, num_classes=0))
    token, weight, bias = torch.randn(1, 1, 64), torch.randn(108, 64), torch.randn(108)
    plain = model.state_dict() | {"mask_token": token, "pred_head.projections.0.weight": weight, "pred_head.projections.0.bias": bias}
    state = {k.replace("norm.", "pred_head.transforms.0.0.") if k.startswith("norm.") else k: v for k, v in plain.items()}    # the head's
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).expand(3, 1, 3, 3)
    torch.save({"model_state": state | {"hogs.0.weight_x": kernel, "hogs.0.weight_y": kernel.mT}, "epoch": 1600}, tmp_path / "maskfeat.pth")
    ours, preset = import_(tmp_path / "maskfeat.pth", maskfeat.weights["slowfast"], lambda name: preset_of("maskfeat", name))
    image, mask = torch.randn(2, 3, 64, 64), torch.rand(2, 16) < 0.4
    torch.testing.assert_close(ours.encoder(image).tokens, model.forward_features(image), rtol=0, atol=1e-4)
    model.patch_embed.register_forward_hook(lambda m, args, out: torch.where(mask[..., None], token, out))       # given patch embeddings
    want = model.forward_features(image)[:, 1:] @ weight.T + bias
    masking = masking_of(mask)
    torch.testing.assert_close(ours.decoder(ours.see(image, masking), masking), want[mask], rtol=0, atol=1e-4)
    assert (preset.config.target.cell, preset.config.sampler.hidden) == (8, 6)
    export(ours.state_dict(), preset.config, maskfeat.weights["slowfast"], tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in back.items())
    torch.save({"model_state": plain}, tmp_path / "plain.pth")                                               # a ViT's own last norm
    twin, _ = import_(tmp_path / "plain.pth", maskfeat.weights["slowfast"], lambda name: preset_of("maskfeat", name))
    assert torch.equal(twin.encoder.body.norm.weight, ours.encoder.body.norm.weight)


def test_other_files_and_other_systems_are_refused(tmp_path):
    layout = maskfeat.weights["slowfast"]
    torch.save({"model_state": {"pred_head.projections.0.weight": torch.zeros(108, 8), "pos_embed_spatial": torch.zeros(1)}}, tmp_path / "m.pth")
    with pytest.raises(UserError, match="video model"):
        import_(tmp_path / "m.pth", layout, lambda name: preset_of("maskfeat", name))
    with pytest.raises(UserError, match="cannot hold"):
        layout.write(preset_of("maskfeat", "tiny_dino").config)


# -- clips ------------------------------------------------------------------------------------------------------------------------------

NAMES = [(r"^conv_proj", "patch_embed.proj"), (r"^pos_encoding.class_token", "cls_token"), (r"^head\..*", ""),
         (r"^norm\.", "pred_head.transforms.0.0."), (r"attn\.pool_(.)\.pool", r"attn.pool_\1"),
         (r"attn\.pool_(.)\.norm_act\.0", r"attn.norm_\1"), (r"attn\.project\.0", "attn.proj"),
         (r"\.project\.", ".proj."), (r"mlp\.0\.", "mlp.fc1."), (r"mlp\.3\.", "mlp.fc2.")]


def torchvisions(widens: str, halved: tuple[int, ...]):
    """A small MViT of torchvision's, of 8 frames and 64 pixels: four blocks, wider in the second and the last."""
    reference("timm")                        # torchvision needs its operators declared
    module = reference("torchvision.models.video.mvit")
    into, out = ((8, 8, 16, 16), (8, 16, 16, 32)) if widens == "attention" else ((8, 16, 16, 32), (16, 16, 32, 32))
    heads, reach, setting = (1, 2, 2, 4), 8, []
    for i in range(4):
        step = 2 if i in halved else 1
        reach = max(1, reach // step)
        setting.append(module.MSBlockConfig(heads[i], into[i], out[i], [3, 3, 3], [3, 3, 3], [1, step, step], [1, reach, reach]))
    model = module.MViT((64, 64), 8, setting, residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True,
                        proj_after_attn=widens == "attention", num_classes=5)
    return shake(model)


def slowfasts(model, token, weight, bias):
    state = renamed(model.state_dict(), NAMES)
    state["cls_token"] = state["cls_token"].view(1, 1, -1)
    return state | {"mask_token": token, "pred_head.projections.0.weight": weight, "pred_head.projections.0.bias": bias}


def renamed(state, rules):
    out = {}
    for name, value in state.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        if name:
            out[name] = value
    return out


@torch.no_grad()
@pytest.mark.parametrize("widens, halved", [("mlp", (1,)), ("attention", (1,)), ("mlp", (1, 3))])
def test_clips_of_slowfast_in_and_out_and_the_backbone_is_torchvisions(tmp_path, widens, halved):
    model = torchvisions(widens, halved)
    token, weight, bias = torch.randn(1, 1, 8), torch.randn(108, 32), torch.randn(108)
    state = slowfasts(model, token, weight, bias)
    torch.save({"model_state": state}, tmp_path / "maskfeat.pth")
    layout, presets = maskfeat.weights["slowfast_video"], lambda name: preset_of("maskfeat", name)
    ours, preset = import_(tmp_path / "maskfeat.pth", layout, presets)
    c, grid = preset.config, ours.encoder.grid
    assert (c.encoder.doubled, c.encoder.halved, c.encoder.widens, c.encoder.frames, c.encoder.image_size) == ((1, 3), halved, widens, 8, 64)
    assert (preset.feed.video.frames, c.target.patch, grid) == (8, 4 << len(halved), (4, 16 >> len(halved), 16 >> len(halved)))
    video = torch.randn(2, 8, 3, 64, 64)
    held = []
    model.norm.register_forward_hook(lambda m, args, out: held.append(out))
    model(video.transpose(1, 2))
    torch.testing.assert_close(ours.encoder(video).tokens, held.pop(), rtol=0, atol=1e-4)
    mask = torch.rand(2, grid[0] * grid[1] * grid[2]) < 0.4
    fine = F.interpolate(mask.view(2, *grid).float(), size=(16, 16)).flatten(1)[:, None] > 0.5
    model.conv_proj.register_forward_hook(lambda m, args, out: torch.where(fine.view(2, 1, 4, 16, 16), token.view(1, -1, 1, 1, 1), out))
    model(video.transpose(1, 2))
    want, masking = held.pop()[:, 1:] @ weight.T + bias, masking_of(mask)
    torch.testing.assert_close(ours.decoder(ours.see(video, masking), masking), want[mask], rtol=0, atol=1e-4)
    export(ours.state_dict(), c, layout, tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in back.items())


@torch.no_grad()
def test_clips_of_another_size_read_the_tables_between_their_rows():
    """torchvision's tables, stretched to a grid that is not theirs."""
    model = torchvisions("attention", (1,))
    table = model.blocks[2].attn
    x, grid = torch.randn(1, 1 + 4 * 6 * 6, 16), (4, 6, 6)
    ours = PooledAttention(PooledAttention.Config(into=16, width=16, heads=2, grid=(4, 8, 8), reach=4, eps=1e-6))
    names = [(r"^pool_(.)\.pool", r"pool_\1.conv"), (r"norm_act\.0", "norm"), (r"project\.0", "out"), ("rel_pos_h", "rows"), ("rel_pos_w", "columns"),
             ("rel_pos_t", "times")]
    ours.load_state_dict(renamed(table.state_dict(), names))
    got, want = ours(x, grid), table(x, grid)
    assert got[1] == want[1]
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-4)


def test_pictures_and_clips_are_not_taken_for_each_other():
    for layout, preset in (("slowfast_video", "paper"), ("slowfast", "mvit_s")):
        with pytest.raises(UserError, match="cannot hold"):
            maskfeat.weights[layout].write(preset_of("maskfeat", preset).config)
