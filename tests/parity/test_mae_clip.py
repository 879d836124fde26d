"""MAE-CLIP's branches: pictures against transformers' ViTMAE for a forced mask, contrast against open_clip's loss. Random weights, toy size."""
import torch
from reference import reference, shake

from polysense.nn.masking import masking_by
from polysense.systems.align import mae_clip
from polysense.weights import mae_hf
from polysense.weights.convert import compare as assert_agree
from polysense.weights.keymap import load_into


@torch.no_grad()
def test_drawing_is_vit_maes_and_contrast_open_clips():
    torch.manual_seed(0)
    hf = reference("transformers")
    theirs = shake(hf.ViTMAEForPreTraining(hf.ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, layer_norm_eps=1e-6,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=64, norm_pix_loss=True)))
    from polysense.base.catalogue import preset_of
    name, overrides = mae_hf.LAYOUT.read(theirs.config.to_dict(), theirs.state_dict())
    mae = preset_of("mae", name).but(**overrides).config
    system = mae_clip.config(32, 8, (32, 2, 2), (32, 1, 2), (16, 1, 2), 16, 100, 12, 4, (0, 1, 2)).but(
        vision=mae.encoder, **{"decoder": mae.decoder}).build().eval()
    whole = mae.build()
    load_into(whole, mae_hf.LAYOUT.keymap(mae), theirs.state_dict())
    system.vision.load_state_dict(whole.encoder.state_dict())
    system.decoder.load_state_dict(whole.decoder.state_dict())
    image, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    out = theirs(image, noise=noise)
    masking = masking_by(noise, 4)
    drawn = system.draw(image, masking)
    want = out.logits.gather(1, masking.hidden[..., None].expand(-1, -1, 192))
    loss = (drawn - system.target(image, masking)).square().mean()
    assert_agree({"drawn": drawn, "loss": loss}, {"drawn": want, "loss": out.loss})

    text = torch.randint(5, 90, (3, 8))
    seen = system.embed_masked({"image": image, "text": text})
    clip = reference("open_clip").ClipLoss()(seen["image"], seen["text"], system.scale)
    assert_agree({"contrast": system.compare_masked(seen)["contrast"]}, {"contrast": clip})
