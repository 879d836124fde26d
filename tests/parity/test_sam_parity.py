"""SAM through published files and back: transformers' layout and the authors' own. Random weights, toy sizes, every tolerance 1e-4."""
import json

import pytest
import torch
from reference import reference, shake
from safetensors.torch import load_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.connectors.prompt import places
from polysense.systems.prompt import sam
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

LAYOUTS = sam.weights


def presets(name: str):
    return preset_of("sam", name)


@pytest.fixture(scope="module")
def theirs():
    hf = reference("transformers.models.sam")
    body = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 40, "patch_size": 4, "window_size": 3,
            "global_attn_indexes": [1], "num_pos_feats": 8, "output_channels": 16, "mlp_dim": 24}
    decoder = {"hidden_size": 16, "mlp_dim": 20, "num_attention_heads": 2, "iou_head_hidden_dim": 12}
    torch.manual_seed(0)
    model = shake(hf.SamModel(hf.SamConfig(vision_config=body, mask_decoder_config=decoder, prompt_encoder_config={
        "hidden_size": 16, "image_size": 40, "patch_size": 4})))
    with torch.no_grad():                    # frequencies of order one, as in the released files
        model.shared_image_embedding.positional_embedding.normal_()
    return model


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam")
    theirs.save_pretrained(folder)
    return import_(folder, LAYOUTS["hf"], presets)[0]


IMAGE = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(3))
POINTS = torch.tensor([[[[3.0, 30.0], [12.0, 8.0]], [[20.0, 20.0], [0.0, 0.0]]], [[[1.0, 39.0], [33.0, 2.0]], [[9.0, 9.0], [30.0, 31.0]]]])
LABELS = torch.tensor([[[1, 0], [1, -1]], [[1, 1], [0, 1]]])
BOXES = torch.tensor([[[2.0, 3.0, 20.0, 30.0], [0.0, 0.0, 39.0, 39.0]], [[10.0, 10.0, 14.0, 38.0], [5.0, 1.0, 30.0, 8.0]]])


@torch.no_grad()
def test_image_encoding_agrees(theirs, ours):
    assert_agree({"seen": ours.look(IMAGE)}, {"seen": theirs.get_image_embeddings(IMAGE)})


@pytest.mark.parametrize("prompt", ["points", "box", "points and box", "mask"])
@pytest.mark.parametrize("single", [False, True])
@torch.no_grad()
def test_answers_agree(theirs, ours, prompt, single):
    asks = {"input_points": POINTS, "input_labels": LABELS} if "points" in prompt else {}
    asks |= {"input_boxes": BOXES} if "box" in prompt else {}
    points, labels, boxes = (POINTS / 40, LABELS, None) if "points" in prompt else (None, None, None)
    boxes = BOXES / 40 if "box" in prompt else None
    mask = None
    if prompt == "mask":                     # theirs takes one rough mask a picture; with a point, as a rough mask is always used
        asks, mask = {"input_points": POINTS[:, :1], "input_labels": LABELS[:, :1]}, torch.randn(2, 40, 40)
        asks["input_masks"], points, labels = mask[:, None], POINTS[:, :1] / 40, LABELS[:, :1]
    want = theirs(image_embeddings=theirs.get_image_embeddings(IMAGE), multimask_output=not single, **asks)
    n = (points if points is not None else boxes).shape[1]
    flat = [None if v is None else v.flatten(0, 1) for v in (points, labels, boxes)]
    tokens = ours.prompt.tokens(*places(*flat))
    logits, score = ours.answer(ours.look(IMAGE).repeat_interleave(n, 0), tokens, mask, single=single)
    assert_agree({"masks": logits.unflatten(0, (2, n)), "iou": score.unflatten(0, (2, n))}, {"masks": want.pred_masks, "iou": want.iou_scores})


@torch.no_grad()
def test_segment_gives_candidates_to_one_prompt_and_one_answer_to_more(theirs, ours):
    logits, score = ours.segment(IMAGE, POINTS[:, :, :1] / 40, LABELS[:, :, :1])
    want = theirs(IMAGE, input_points=POINTS[:, :, :1], input_labels=LABELS[:, :, :1], multimask_output=True)
    assert_agree({"masks": logits, "iou": score}, {"masks": want.pred_masks, "iou": want.iou_scores})
    logits, score = ours.segment(IMAGE, POINTS / 40, LABELS, BOXES / 40)
    want = theirs(IMAGE, input_points=POINTS, input_labels=LABELS, input_boxes=BOXES, multimask_output=False)
    assert_agree({"masks": logits, "iou": score}, {"masks": want.pred_masks, "iou": want.iou_scores})


@torch.no_grad()
def test_export_is_read_by_transformers(theirs, ours, tmp_path):
    config = import_(save(theirs, tmp_path / "theirs"), LAYOUTS["hf"], presets)[1].config
    export(ours.state_dict(), config, LAYOUTS["hf"], tmp_path / "ours", presets("vit_b").feed)
    again = reference("transformers.models.sam").SamModel.from_pretrained(tmp_path / "ours").eval()
    a, b = (m(IMAGE, input_boxes=BOXES) for m in (theirs, again))
    assert_agree({"masks": a.pred_masks, "iou": a.iou_scores}, {"masks": b.pred_masks, "iou": b.iou_scores}, 1e-6)
    assert json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text())["size"] == {"longest_edge": 1024}


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names back to the authors', written down by hand from their published file."""
    out = {}
    for k, v in state.items():
        if k.startswith("prompt_encoder.shared_embedding"):
            continue
        for a, b in (("shared_image_embedding.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
                     ("vision_encoder", "image_encoder"), ("patch_embed.projection", "patch_embed.proj"), (".layers.0.layer_norm", ".layers.0.norm"),
                     ("neck.conv1", "neck.0"), ("neck.layer_norm1", "neck.1"), ("neck.conv2", "neck.2"), ("neck.layer_norm2", "neck.3"),
                     ("mask_embed.conv1", "mask_downscaling.0"), ("mask_embed.layer_norm1", "mask_downscaling.1"),
                     ("mask_embed.conv2", "mask_downscaling.3"), ("mask_embed.layer_norm2", "mask_downscaling.4"),
                     ("mask_embed.conv3", "mask_downscaling.6"), ("encoder.point_embed.", "encoder.point_embeddings."),
                     ("layer_norm_final_attn", "norm_final_attn"), ("upscale_conv1", "output_upscaling.0"),
                     ("upscale_layer_norm", "output_upscaling.1"), ("upscale_conv2", "output_upscaling.3"), ("layer_norm", "norm")):
            k = k.replace(a, b)
        if k.startswith("image_encoder.layers"):
            k = k.replace("image_encoder.layers", "image_encoder.blocks")
        if "mlps" in k or "prediction_head" in k:
            k = k.replace("layers.0", "layers.1").replace("proj_in", "layers.0").replace("proj_out", "layers.2")
        out[k] = v.contiguous()
    return out


@torch.no_grad()
def test_the_authors_layout_both_ways(theirs, ours, tmp_path):
    state = official(theirs.state_dict())
    torch.save(state, tmp_path / "sam_vit_t.pth")
    system, preset = import_(tmp_path / "sam_vit_t.pth", LAYOUTS["official"], lambda name: presets(name).but(**{"config.decoder.heads": 2}))
    assert preset.config.vision.whole == (1,) and preset.config.vision.window == 3 and preset.config.decoder.eps == 1e-5
    for block in system.decoder.blocks:      # the two codes differ in this eps alone
        for norm in (block.norm1, block.norm2, block.norm3, block.norm4):
            norm.eps = 1e-6
    a, b = (s.segment(IMAGE, boxes=BOXES / 40) for s in (system, ours))
    assert_agree({"masks": a[0], "iou": a[1]}, {"masks": b[0], "iou": b[1]}, 1e-6)
    with pytest.raises(UserError, match="8 heads"):
        export(system.state_dict(), preset.config, LAYOUTS["official"], tmp_path / "no.safetensors")
    export(system.state_dict(), preset.config.but(**{"decoder.heads": 8}), LAYOUTS["official"], tmp_path / "out.safetensors")
    back = load_file(tmp_path / "out.safetensors")
    assert set(back) == set(state) and all(torch.equal(back[k], state[k]) for k in state)


def test_files_of_another_kind_are_refused(theirs, tmp_path):
    save(theirs, tmp_path)
    with pytest.raises(UserError, match="looks like sam/hf"):
        import_(tmp_path / "model.safetensors", LAYOUTS["official"], presets)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UserError, match="not 'sam'"):
        import_(tmp_path, LAYOUTS["hf"], presets)


def test_a_sam_with_words_has_no_published_layout():
    with pytest.raises(UserError, match="no words"):
        LAYOUTS["hf"].write(presets("words").config)
