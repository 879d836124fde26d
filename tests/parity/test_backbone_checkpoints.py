"""ViT, ResNet and BERT through published files and back: timm, torchvision names, transformers. Random weights, toy sizes, tolerance 1e-4."""
import json

import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import load_file, save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.head import TanhHead
from polysense.systems.backbone import resnet, vit
from polysense.weights import bert_hf
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_
from polysense.weights.keymap import load_into

CLASSES = 5


def presets(system: str):
    return lambda name: preset_of(system, name)


@torch.no_grad()
def outputs(system, image: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
    """logits, the pooled feature, and the loss that the recipe trains."""
    loss = system.losses({"image": image, "label": label})["label"]
    return {"logits": system.classify(image), "feature": system.backbone(image).pooled, "loss": loss}


def expected(logits: torch.Tensor, feature: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"logits": logits, "feature": feature, "loss": F.cross_entropy(logits, label)}


def timm_outputs(model, image, label):
    with torch.no_grad():
        return expected(model(image), model.forward_head(model.forward_features(image), pre_logits=True), label)


def save_timm(folder, model) -> None:
    """timm's own exporter."""
    reference("timm.models._hub").save_for_hf(model, str(folder), safe_serialization=True)


@pytest.mark.parametrize("args", [{}, {"qkv_bias": False, "init_values": 0.1}, {"class_token": False, "global_pool": "avg", "fc_norm": False}],
                         ids=["plain", "scales, no qkv bias", "mean without class token"])
def test_timm_vit_in_and_out(tmp_path, args):
    timm = reference("timm")
    theirs = shake(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_classes=CLASSES, **args))
    save_timm(tmp_path / "theirs", theirs)
    if args:                                                  # what timm records of the arguments differs by version
        config = json.loads((tmp_path / "theirs" / "config.json").read_text())
        config["model_args"] = {**config.get("model_args", {}), **args}
        (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    ours, preset = import_(tmp_path / "theirs", vit.weights["timm"], presets("vit"))
    image, label = torch.randn(3, 3, 32, 32), torch.tensor([0, 4, 2])
    want = timm_outputs(theirs, image, label)
    assert_agree(outputs(ours, image, label), want)
    assert preset.feed.image.mean == (0.5, 0.5, 0.5) and preset.feed.image.size == 32

    export(ours.state_dict(), preset.config, vit.weights["timm"], tmp_path / "back", preset.feed)
    again = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    assert_agree(timm_outputs(again, image, label), want)
    assert import_(tmp_path / "back", vit.weights["timm"], presets("vit"))[1].config == preset.config


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_timm_resnet_in_and_out(tmp_path, name):
    timm = reference("timm")
    theirs = shake(timm.create_model(name, layers=(1, 2, 1, 1), num_classes=CLASSES))
    save_timm(tmp_path / "theirs", theirs)
    ours, preset = import_(tmp_path / "theirs", resnet.weights["timm"], presets("resnet"))
    image, label = torch.randn(2, 3, 64, 64), torch.tensor([0, 4])
    want = timm_outputs(theirs, image, label)
    assert_agree(outputs(ours, image, label), want)
    export(ours.state_dict(), preset.config, resnet.weights["timm"], tmp_path / "back", preset.feed)
    again = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    assert_agree(timm_outputs(again, image, label), want)


@pytest.mark.parametrize("kind, layers", [("BasicBlock", (2, 1, 1, 1)), ("Bottleneck", (1, 1, 2, 1))])
def test_torchvision_resnet_from_a_bare_pth(tmp_path, kind, layers):
    """torchvision publishes a .pth without a configuration: the shapes say which ResNet it is."""
    reference("timm")
    tv = reference("torchvision.models.resnet")
    theirs = shake(tv.ResNet(getattr(tv, kind), list(layers), num_classes=CLASSES))
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    ours, preset = import_(tmp_path / "resnet.pth", resnet.weights["timm"], presets("resnet"))
    image, label = torch.randn(2, 3, 64, 64), torch.tensor([1, 3])
    with torch.no_grad():
        pooled = torch.nn.Sequential(*list(theirs.children())[:-1])(image).flatten(1)
        assert_agree(outputs(ours, image, label), expected(theirs(image), pooled, label))
        x, maps = torch.nn.Sequential(*list(theirs.children())[:4])(image), {}
        for s in range(4):
            x = getattr(theirs, f"layer{s + 1}")(x)
            maps[f"stage {s}"] = x
        assert_agree({f"stage {s}": m for s, m in enumerate(ours.backbone.features(image))}, maps)
    back = resnet.weights["timm"].keymap(preset.config).save(ours.state_dict())
    assert all(torch.equal(v, back[k]) for k, v in theirs.state_dict().items()) and len(back) == len(theirs.state_dict())


def test_a_resnet_without_counters_loads_and_without_statistics_does_not(tmp_path):
    timm = reference("timm")
    state = timm.create_model("resnet18", layers=(1, 1, 1, 1), num_classes=CLASSES).state_dict()
    save_file({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "a.safetensors")
    import_(tmp_path / "a.safetensors", resnet.weights["timm"], presets("resnet"))
    save_file({k: v for k, v in state.items() if "bn1.running_mean" not in k}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"backbone\.stem\.norm\.running_mean \(theirs: bn1\.running_mean\)"):
        import_(tmp_path / "b.safetensors", resnet.weights["timm"], presets("resnet"))


BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
VIT = {**BODY, "image_size": 32, "patch_size": 8, "num_labels": CLASSES}


@pytest.mark.parametrize("more", [{}, {"qkv_bias": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3}], ids=["plain", "other values"])
def test_transformers_vit_in_and_out_under_both_sets_of_names(tmp_path, more):
    hf = reference("transformers")
    theirs = shake(hf.ViTForImageClassification(hf.ViTConfig(**VIT, **more)))
    theirs.save_pretrained(tmp_path / "theirs")
    hf.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", vit.weights["hf"], presets("vit"))
    assert preset.feed.image.mean == (0.1, 0.2, 0.3) and (preset.feed.image.fit, preset.feed.image.resample) == ("squash", "bilinear")
    image, label = torch.randn(3, 3, 32, 32), torch.tensor([0, 4, 2])

    @torch.no_grad()
    def run(model):
        return expected(model(image).logits, model.vit(image).last_hidden_state[:, 0], label)
    want = run(theirs)
    assert_agree(outputs(ours, image, label), want)

    on_disk, in_memory, table = load_file(tmp_path / "theirs" / "model.safetensors"), theirs.state_dict(), vit.weights["hf"].keymap(preset.config)
    assert on_disk.keys() != in_memory.keys()                 # else this test no longer tests both
    one, two = table.load(on_disk), table.load(in_memory)
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())
    assert table.save(one).keys() == on_disk.keys()

    export(ours.state_dict(), preset.config, vit.weights["hf"], tmp_path / "back", preset.feed)
    assert_agree(run(hf.ViTForImageClassification.from_pretrained(tmp_path / "back").eval()), want)
    processor = hf.ViTImageProcessor.from_pretrained(tmp_path / "back")
    assert list(processor.image_mean) == [0.1, 0.2, 0.3] and not getattr(processor, "do_center_crop", False)


@pytest.mark.parametrize("pooler", [True, False])
@torch.no_grad()
def test_transformers_vit_without_classes(tmp_path, pooler):
    """ViTModel: its tanh pooler is our head; without a pooler the head is empty."""
    hf = reference("transformers")
    theirs = shake(hf.ViTModel(hf.ViTConfig(**VIT), add_pooling_layer=pooler))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", vit.weights["hf"], presets("vit"))
    image = torch.randn(2, 3, 32, 32)
    out = theirs(image)
    assert_agree({"head": ours.classify(image)}, {"head": out.pooler_output if pooler else out.last_hidden_state[:, 0]})
    export(ours.state_dict(), preset.config, vit.weights["hf"], tmp_path / "back")
    again = hf.ViTModel.from_pretrained(tmp_path / "back", add_pooling_layer=pooler).eval()(image)
    assert_agree({"tokens": again.last_hidden_state}, {"tokens": out.last_hidden_state})


@pytest.mark.parametrize("kind, widths, first", [("bottleneck", [32, 64], False), ("bottleneck", [32, 64, 128], True), ("basic", [8, 16], False)])
def test_transformers_resnet_in_and_out(tmp_path, kind, widths, first):
    hf = reference("transformers")
    theirs = shake(hf.ResNetForImageClassification(hf.ResNetConfig(
        embedding_size=8, hidden_sizes=widths, depths=[2, 1, 1][:len(widths)], layer_type=kind, downsample_in_bottleneck=first, num_labels=CLASSES)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", resnet.weights["hf"], presets("resnet"))
    image, label = torch.randn(2, 3, 64, 64), torch.tensor([0, 4])

    @torch.no_grad()
    def run(model):
        return expected(model(image).logits, model.resnet(image).pooler_output.flatten(1), label)
    want = run(theirs)
    assert_agree(outputs(ours, image, label), want)
    export(ours.state_dict(), preset.config, resnet.weights["hf"], tmp_path / "back", preset.feed)
    again = hf.ResNetForImageClassification.from_pretrained(tmp_path / "back").eval()
    assert_agree(run(again), want)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in theirs.state_dict().items())


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "names of 2018"])
@torch.no_grad()
def test_transformers_bert_in_and_out(tmp_path, kind):
    hf = reference("transformers")
    settings = hf.BertConfig(vocab_size=50, max_position_embeddings=12, layer_norm_eps=1e-6, **BODY)
    theirs = shake(hf.BertForMaskedLM(settings) if kind == "BertForMaskedLM" else hf.BertModel(settings))
    theirs.save_pretrained(tmp_path)
    state, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    if kind == "names of 2018":
        state = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in state.items()}
        state["embeddings.position_ids"] = torch.arange(12)[None]
    lit = preset_of("lit", "tiny").config
    text = lit.but(**bert_hf.sizes(config, "text")).text
    if kind != "BertForMaskedLM":
        text = text.but(pooler=TanhHead.Config(into=32, hidden=32))
    ours = text.build().eval()
    load_into(ours, bert_hf.keymap(text), state)
    ids = torch.randint(1, 50, (2, 10))
    ids[1, 6:] = 0
    body = theirs.bert if kind == "BertForMaskedLM" else theirs
    want = body(ids, attention_mask=(ids != 0).long())
    got = ours(ids)
    assert_agree({"one": got.tokens[0], "two": got.tokens[1, :6]}, {"one": want.last_hidden_state[0], "two": want.last_hidden_state[1, :6]})
    if kind == "BertModel":
        assert_agree({"pooled": got.pooled}, {"pooled": want.pooler_output})
        (tmp_path / "back").mkdir()
        (tmp_path / "back" / "config.json").write_text(json.dumps(bert_hf.write(text)))
        save_file(bert_hf.keymap(text).save(ours.state_dict()), tmp_path / "back" / "model.safetensors", metadata={"format": "pt"})
        again = hf.BertModel.from_pretrained(tmp_path / "back").eval()
        assert_agree({"tokens": again(ids, attention_mask=(ids != 0).long()).last_hidden_state}, {"tokens": want.last_hidden_state})


def test_variants_that_are_not_read_are_refused_by_name(tmp_path):
    timm = reference("timm")
    for name, word in (("vit_tiny_patch16_224", "fc_norm"),):
        model = timm.create_model(name, img_size=32, patch_size=8, embed_dim=48, depth=1, num_classes=CLASSES, global_pool="avg")
        save_timm(tmp_path / word, model)
        with pytest.raises(UserError, match=word):
            import_(tmp_path / word, vit.weights["timm"], presets("vit"))
    save_file(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2).state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match=r"config\.json"):
        import_(tmp_path / "bare.safetensors", vit.weights["timm"], presets("vit"))
    with pytest.raises(UserError, match="3x3"):
        resnet.weights["timm"].write(preset_of("resnet", "paper").config)
    with pytest.raises(UserError, match="head"):
        vit.weights["hf"].write(preset_of("vit", "paper").config)
