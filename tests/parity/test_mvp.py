"""MVP's halves against transformers: CLIP's patch tokens through the last norm and the projection, BEiT with mask tokens; and the loss of both."""
import torch
import torch.nn.functional as F
from reference import reference, shake

from polysense.base.catalogue import preset_of
from polysense.nn.masking import masking_of
from polysense.systems.align import clip
from polysense.systems.selfsup import mvp
from polysense.towers.beit import shared_bias
from polysense.weights import beit
from polysense.weights.convert import import_

BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@torch.no_grad()
def test_teacher_student_and_loss_are_transformers(tmp_path):
    hf = reference("transformers")
    text = {"vocab_size": 60, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, **BODY}
    vision = {**BODY, "hidden_act": "quick_gelu", "image_size": 32, "patch_size": 8}
    teacher = shake(hf.CLIPModel(hf.CLIPConfig(text_config=text, projection_dim=24, vision_config=vision)))
    teacher.logit_scale.fill_(2.5)
    teacher.save_pretrained(tmp_path / "clip")
    lender, lent = import_(tmp_path / "clip", clip.weights["hf"], lambda name: preset_of("clip", name))
    student = shake(hf.BeitForMaskedImageModeling(hf.BeitConfig(
        **BODY, image_size=32, patch_size=8, layer_scale_init_value=0.1, use_mean_pooling=True, vocab_size=24, layer_norm_eps=1e-6,
        use_mask_token=True, use_shared_relative_position_bias=True, use_relative_position_bias=False)))
    config = preset_of("mvp").config
    encoder = shared_bias(32, 8, 32, 2, 4, 0.1).but(**{"body.block.mlp.hidden": 64})
    target = config.target.but(tower=lent.config.vision, head=lent.config.image_head, width=24, size=32)
    ours = config.but(encoder=encoder, target=target).build().eval()
    state = beit.hf_keymap(None).load(student.state_dict())
    for part, other in (("tower", lender.vision), ("head", lender.image_head)):
        state |= {f"target.{part}.{k}": v for k, v in other.state_dict().items()}
    ours.load_state_dict(state)
    crop, mask = torch.rand(3, 3, 32, 32), torch.rand(3, 16) < 0.4
    said_in, seen_by = (((crop - torch.tensor(m).view(1, 3, 1, 1)) / torch.tensor(s).view(1, 3, 1, 1)) for m, s in (
        (mvp.MEAN, mvp.STD), (config.target.tower_mean, config.target.tower_std)))
    tower = teacher.vision_model
    want = teacher.visual_projection(tower.post_layernorm(tower(seen_by).last_hidden_state))[:, 1:]
    torch.testing.assert_close(ours.target.whole(said_in), want, rtol=0, atol=1e-4)
    masking = masking_of(mask)
    logits = student(said_in, bool_masked_pos=mask).logits
    said, truth = ours.pairs(said_in, masking)
    torch.testing.assert_close(said, logits[mask], rtol=0, atol=1e-4)
    torch.testing.assert_close(mvp.masked_cosine(said, truth), 1 - F.cosine_similarity(logits[mask], want[mask], dim=-1).mean(), rtol=0, atol=1e-4)
