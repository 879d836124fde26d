"""EVA against timm's Eva, and its authors' names in and out."""
import pytest
import torch
from reference import reference, shake
from safetensors.torch import load_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.masking import masking_of
from polysense.systems.selfsup import eva
from polysense.weights.convert import export, import_


@torch.no_grad()
def test_authors_names_in_and_out_and_tokens_are_timms(tmp_path):
    timm = reference("timm")
    model = shake(timm.models.eva.Eva(img_size=64, patch_size=16, embed_dim=64, depth=2, num_heads=1, mlp_ratio=2.0, qkv_bias=True, qkv_fused=True,
                                      num_classes=0, use_rot_pos_emb=False, use_abs_pos_emb=True, global_pool="token"))
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("k_bias")}
    assert all(not k.endswith("k_bias") or not v.any() for k, v in model.state_dict().items()), "keys have no bias"
    state |= {"mask_token": torch.randn(1, 1, 64), "lm_head.weight": torch.randn(24, 64), "lm_head.bias": torch.randn(24)}
    torch.save({"module": state}, tmp_path / "eva.pt")
    ours, preset = import_(tmp_path / "eva.pt", eva.weights["baai"], lambda name: preset_of("eva", name).but(
        **{"config.target.tower.body.depth": 1, "config.target.tower.body.width": 64, "config.target.head.into": 64}))
    image, mask = torch.randn(2, 3, 64, 64), torch.rand(2, 16) < 0.4
    torch.testing.assert_close(ours.encoder(image).tokens, model.forward_features(image), rtol=0, atol=1e-4)
    model.patch_embed.register_forward_hook(lambda m, args, out: torch.where(mask[..., None], state["mask_token"], out))
    want = torch.nn.functional.linear(model.forward_features(image)[:, 1:], state["lm_head.weight"], state["lm_head.bias"])[mask]
    masking = masking_of(mask)
    torch.testing.assert_close(ours.decoder(ours.see(image, masking), masking), want, rtol=0, atol=1e-4)
    assert preset.config.target.width == 24 and preset.config.sampler.hidden == round(105 / 16)
    export(ours.state_dict(), preset.config, eva.weights["baai"], tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in back.items())


def test_a_fine_tuned_file_is_refused(tmp_path):
    torch.save({"module": {"blocks.0.attn.q_bias": torch.zeros(4)}}, tmp_path / "eva.pt")
    with pytest.raises(UserError, match="no head for features"):
        import_(tmp_path / "eva.pt", eva.weights["baai"], lambda name: preset_of("eva", name))
