"""Frames and texts against transformers' CLIPModel, the aggregation against numpy, through the published layout both ways."""
import numpy as np
import torch
from reference import reference, shake

import polysense
from polysense.base.catalogue import preset_of
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

recipe = polysense.load("clip_frame_aggregation")


def theirs():
    hf = reference("transformers")
    body = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return shake(hf.CLIPModel(hf.CLIPConfig(
        text_config={"vocab_size": 60, "max_position_embeddings": 10, "eos_token_id": 50, "bos_token_id": 1, "pad_token_id": 0, **body},
        vision_config={**body, "image_size": 16, "patch_size": 8}, projection_dim=24)))


@torch.no_grad()
def test_frames_texts_and_similarities_agree_and_the_layout_goes_both_ways(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", recipe.weights["hf"], lambda name: preset_of("clip_frame_aggregation", name))
    assert isinstance(ours, recipe.CLIPFrameAggregation) and not preset.stages
    video, text = torch.randn(2, 33, 3, 16, 16), torch.randint(3, 49, (4, 10))
    text[:, -2:] = 50
    out = model(input_ids=text, pixel_values=video.flatten(0, 1))
    frames = out.image_embeds / out.image_embeds.norm(dim=-1, keepdim=True)
    words = out.text_embeds / out.text_embeds.norm(dim=-1, keepdim=True)
    assert_agree({"frames": ours.encode_frames(video.flatten(0, 1)), "text": ours.encode_text(text)}, {"frames": frames, "text": words})

    x = frames.unflatten(0, (2, 33)).numpy()
    mean = x.mean(1)
    wanted = {"mean": mean / np.linalg.norm(mean, axis=-1, keepdims=True), "single": x[:, 29]}
    for name, part in (("mean", recipe.Mean.Config()), ("single", recipe.SingleFrame.Config())):
        ours.aggregate = part.build()
        got = ours.encode_text(text) @ ours.encode_video(video).T
        assert_agree({"similarity": got}, {"similarity": words @ torch.from_numpy(wanted[name]).T})

    export(ours.state_dict(), preset.config, recipe.weights["hf"], tmp_path / "back", preset.feed)
    again = reference("transformers").CLIPModel.from_pretrained(tmp_path / "back").eval()
    assert_agree({"frames": again(input_ids=text, pixel_values=video.flatten(0, 1)).image_embeds}, {"frames": frames})
