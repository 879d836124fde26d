"""MOFI's released form is transformers' CLIPModel, its classifier left out. Random weights, toy size."""
import torch
import torch.nn.functional as F
from reference import reference, shake

from polysense.base.catalogue import preset_of
from polysense.systems.align import mofi
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_


def presets(name: str):
    return preset_of("mofi", name).but(**{"config.entities": 30})


@torch.no_grad()
def test_towers_in_and_out(tmp_path):
    hf = reference("transformers")
    body = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "hidden_act": "quick_gelu"}
    text = {"vocab_size": 100, "max_position_embeddings": 12, "eos_token_id": 50, "bos_token_id": 1, "pad_token_id": 0, **body}
    theirs = shake(hf.CLIPModel(hf.CLIPConfig(text_config=text, projection_dim=24, vision_config={**body, "image_size": 32, "patch_size": 8})))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", mofi.weights["hf"], presets)
    assert ours.entities.shape == (30, 24)
    image, ids = torch.randn(3, 3, 32, 32), torch.randint(3, 49, (3, 12))
    ids[:, -1] = 50
    out = theirs(input_ids=ids, pixel_values=image)
    assert_agree({"image": ours.encode_image(image), "text": ours.encode_text(ids)},
            {"image": F.normalize(out.image_embeds, dim=-1), "text": F.normalize(out.text_embeds, dim=-1)})
    export(ours.state_dict(), preset.config, mofi.weights["hf"], tmp_path / "back", preset.feed)
    again = hf.CLIPModel.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in theirs.state_dict().items())
