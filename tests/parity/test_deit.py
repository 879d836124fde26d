"""DeiT with its distillation token through timm's and transformers' files and back. Random weights, toy sizes, tolerance 1e-4."""
import pytest
import torch
from reference import reference, shake
from safetensors.torch import load_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.backbone import deit
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_


def presets(name: str):
    return preset_of("deit", name)


@torch.no_grad()
def test_timm_in_and_out(tmp_path):
    timm = reference("timm")
    theirs = shake(timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=5))
    reference("timm.models._hub").save_for_hf(theirs, str(tmp_path / "theirs"), model_args={"num_heads": 4}, safe_serialization=True)
    ours, preset = import_(tmp_path / "theirs", deit.weights["timm"], presets)
    assert ours.teacher is None and preset.feed.image.size == 32 and preset.feed.views[0].size == 32
    image = torch.randn(2, 3, 32, 32)

    def said(model) -> dict[str, torch.Tensor]:
        model.set_distilled_training(True)
        one, two = model.train()(image)
        return {"cls": one, "dist": two, "mean": model.eval()(image), "tokens": model.forward_features(image)}
    want = said(theirs)
    one, two = ours.both(image)
    assert_agree({"cls": one, "dist": two, "mean": ours.classify(image), "tokens": ours.vision(image).tokens}, want)
    export(ours.state_dict(), preset.config, deit.weights["timm"], tmp_path / "back", preset.feed)
    again = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True)
    assert_agree(said(again), want)
    torch.save({"model": theirs.state_dict()}, tmp_path / "deit.pth")      # as the authors publish it; heads by the width alone
    bare = shake(timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=1, num_classes=5))
    torch.save({"model": bare.state_dict()}, tmp_path / "deit.pth")
    assert_agree({"mean": import_(tmp_path / "deit.pth", deit.weights["timm"], presets)[0].classify(image)}, {"mean": bare(image)})


@torch.no_grad()
def test_transformers_in_and_out_under_both_sets_of_names(tmp_path):
    hf = reference("transformers")
    theirs = shake(hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, image_size=32, patch_size=8, num_labels=5)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", deit.weights["hf"], presets)
    image = torch.randn(2, 3, 32, 32)

    def said(model) -> dict[str, torch.Tensor]:
        out = model(image)
        return {"cls": out.cls_logits, "dist": out.distillation_logits, "mean": out.logits}
    one, two = ours.both(image)
    assert_agree({"cls": one, "dist": two, "mean": ours.classify(image)}, said(theirs))
    table, on_disk = deit.weights["hf"].keymap(preset.config), load_file(tmp_path / "theirs" / "model.safetensors")
    a, b = table.load(on_disk), table.load(theirs.state_dict())
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
    export(ours.state_dict(), preset.config, deit.weights["hf"], tmp_path / "back", preset.feed)
    assert_agree(said(hf.DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path / "back").eval()), said(theirs))


def test_a_deit_without_the_second_token_is_told_where_to_go():
    timm = reference("timm")
    with torch.device("meta"):
        state = timm.create_model("deit_tiny_patch16_224").state_dict()
    with pytest.raises(UserError, match="vit/timm"):
        deit.weights["timm"].read({}, state)
