"""MoCo's published files in and out: torchvision's ResNet and timm's ViT with the authors' heads. Random weights, toy sizes, tolerance 1e-4."""
from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
from reference import reference, shake
from torch import nn

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.selfsup import moco
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

LAYOUT = moco.weights["facebook"]


def presets(name: str):
    return preset_of("moco", name)


def resnet(head: nn.Module) -> nn.Module:
    reference("timm")
    tv = reference("torchvision.models.resnet")
    net = tv.ResNet(tv.Bottleneck, [1, 1, 1, 1])
    net.fc = head
    return shake(net)


def perceptron(sizes: tuple[int, ...], last: bool) -> nn.Sequential:
    """The authors' heads of v3."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(a, b, bias=False))
        if i < len(sizes) - 2:
            layers += [nn.BatchNorm1d(b), nn.ReLU()]
        elif last:
            layers.append(nn.BatchNorm1d(b, affine=False))
    return nn.Sequential(*layers)


def saved(path, parts: dict[str, nn.Module], **more) -> dict:
    state = OrderedDict((f"module.{at}.{k}", v) for at, m in parts.items() for k, v in m.state_dict().items())
    state |= {f"module.{k}": v for k, v in more.items()}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": state}, path)
    return {k.removeprefix("module."): v for k, v in state.items()}


def there_and_back(path, state, tmp_path):
    system, preset = import_(path, LAYOUT, presets)
    export(system.state_dict(), preset.config, LAYOUT, tmp_path / "back.pth.tar")
    back = torch.load(tmp_path / "back.pth.tar", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(v, back[k]) for k, v in state.items())
    return system, preset


@pytest.mark.parametrize("version", ["v1", "v2"])
@torch.no_grad()
def test_queue_versions(tmp_path, version):
    def head():
        return nn.Linear(2048, 16) if version == "v1" else nn.Sequential(nn.Linear(2048, 24), nn.ReLU(), nn.Linear(24, 16))
    q, k = resnet(head()), resnet(head())
    state = saved(tmp_path / "m.pth.tar", {"encoder_q": q, "encoder_k": k}, queue=torch.randn(16, 40), queue_ptr=torch.tensor([8]))
    system, preset = there_and_back(tmp_path / "m.pth.tar", state, tmp_path)
    image = torch.randn(2, 3, 64, 64)
    assert_agree({"q": system.project(image), "k": system.aim(image)}, {"q": q(image), "k": k(image)})
    features = nn.Sequential(*list(q.children())[:-1])(image).flatten(1)
    assert_agree({"features": system.encode_image(image)}, {"features": nn.functional.normalize(features, dim=-1)})
    assert torch.equal(system.queue.keys, state["queue"].T) and int(system.queue.pointer) == 8
    assert preset.config.temperature == (0.07 if version == "v1" else 0.2)


@torch.no_grad()
def test_a_file_of_the_query_encoder_alone_gives_its_features(tmp_path):
    q = resnet(nn.Sequential(nn.Linear(2048, 24), nn.ReLU(), nn.Linear(24, 16)))
    state = saved(tmp_path / "m.pth.tar", {"encoder_q": q})
    system, _ = there_and_back(tmp_path / "m.pth.tar", state, tmp_path)
    assert system.teacher is None and system.queue is None
    image = torch.randn(1, 3, 64, 64)
    assert_agree({"q": system.project(image)}, {"q": q(image)})


@torch.no_grad()
def test_v3_of_a_vit(tmp_path):
    timm = reference("timm")

    def vit():
        net = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, num_heads=12, depth=2, num_classes=0)
        net.head = perceptron((48, 20, 20, 12), True)
        return shake(net)
    one, two, predictor = vit(), vit(), shake(perceptron((12, 20, 12), True))
    state = saved(tmp_path / "m.pth.tar", {"base_encoder": one, "momentum_encoder": two, "predictor": predictor})
    system, _ = there_and_back(tmp_path / "m.pth.tar", state, tmp_path)
    image = torch.randn(3, 3, 32, 32)
    want = {"tokens": one.forward_features(image), "projection": one(image), "prediction": predictor(one(image)), "key": two(image)}
    got = {"tokens": system.backbone(image).tokens, "projection": system.project(image), "prediction": system.predictor(system.project(image)),
           "key": system.aim(image)}
    assert_agree(got, want)


@torch.no_grad()
def test_v3_of_a_resnet(tmp_path):
    one, two, predictor = resnet(perceptron((2048, 20, 12), True)), resnet(perceptron((2048, 20, 12), True)), shake(perceptron((12, 20, 12), False))
    state = saved(tmp_path / "m.pth.tar", {"base_encoder": one, "momentum_encoder": two, "predictor": predictor})
    system, _ = there_and_back(tmp_path / "m.pth.tar", state, tmp_path)
    image = torch.randn(2, 3, 64, 64)
    assert_agree({"prediction": system.predictor(system.project(image)), "key": system.aim(image)},
            {"prediction": predictor(one(image)), "key": two(image)})


def test_foreign_cut_and_empty_files_are_refused_in_one_line(tmp_path):
    q = resnet(nn.Linear(2048, 16))
    saved(tmp_path / "foreign.pth.tar", {"": q})
    (tmp_path / "empty.pth.tar").write_bytes(b"")
    saved(tmp_path / "cut.pth.tar", {"encoder_q": q})
    whole = torch.load(tmp_path / "cut.pth.tar", weights_only=True)["state_dict"]
    torch.save({"state_dict": {k: v for k, v in whole.items() if "bn1.running_mean" not in k}}, tmp_path / "cut.pth.tar")
    for name in ("foreign", "empty", "cut"):
        with pytest.raises(UserError) as caught:
            import_(tmp_path / f"{name}.pth.tar", LAYOUT, presets)
        assert "\n" not in str(caught.value)
