"""MaskFeat's backbone against timm's ViT, and PySlowFast's names in and out."""
import pytest
import torch
from reference import reference, shake
from safetensors.torch import load_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.masking import masking_of
from polysense.systems.selfsup import maskfeat
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
