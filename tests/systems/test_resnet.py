"""ResNet's essence (He et al. 2016)."""
import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.nn.norm import freeze_norm
from polysense.nn.residual import Bottleneck, Pad
from polysense.towers.resnet import ResNet

recipe = polysense.load("resnet")


@pytest.mark.parametrize("name, count", [("paper", 25_557_032), ("resnet50", 25_557_032), ("resnet18", 11_689_512)])
def test_published_sizes(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in getattr(recipe, name)().config.build().parameters()) == count


def test_activation_comes_after_the_addition():
    """With the last norm's weight at zero a block is exactly ReLU(shortcut(x))."""
    for config in (preset_of("resnet").config.backbone, ResNet.Config(layers=(2, 2), base=8, block=Bottleneck.Config(stride_in="3x3"))):
        net = config.build().eval()
        for stage in net.stages:
            for block in stage:
                last = block.norm3 if hasattr(block, "norm3") else block.norm2
                torch.nn.init.zeros_(last.weight)
                torch.nn.init.zeros_(last.bias)
                width = block.conv1.weight.shape[1]
                x = torch.randn(2, width, 8, 8)
                torch.testing.assert_close(block(x), F.relu(block.shortcut(x) if block.shortcut is not None else x))


def test_option_a_pads_new_channels_with_zeros_and_has_no_parameters():
    pad = Pad.Config(into=4, out=8, stride=2).build()
    x = torch.randn(1, 4, 6, 6)
    y = pad(x)
    assert y.shape == (1, 8, 3, 3) and not list(pad.parameters())
    kept = y[0, y[0].flatten(1).abs().sum(1) > 0]
    torch.testing.assert_close(kept, x[0, :, ::2, ::2])


def test_the_plain_net_is_the_same_without_shortcuts():
    plain, residual = preset_of("resnet", "plain").config.build(), preset_of("resnet").config.build()
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in residual.state_dict().items()}
    plain.load_state_dict(residual.state_dict())
    image = torch.randn(4, 3, 28, 28)
    assert not torch.allclose(plain.eval().classify(image), residual.eval().classify(image), atol=1e-3)


def test_depth_starves_the_plain_nets_stem_of_gradient_but_not_the_residual_nets():
    def stem_gradient(depth: int, shortcut) -> float:
        torch.manual_seed(0)
        net = recipe.cifar_form(depth, base=8, shortcut=shortcut).build().eval()      # eval: batch statistics would rescale each layer
        for m in net.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.weight.data.fill_(0.5)
        loss = F.cross_entropy(net.classify(torch.randn(16, 3, 28, 28)), torch.arange(16) % 10)
        loss.backward()
        return net.backbone.stem.conv.weight.grad.norm().item()

    residual = stem_gradient(56, Pad.Config()) / stem_gradient(20, Pad.Config())
    plain = stem_gradient(56, None) / max(stem_gradient(20, None), 1e-30)
    assert 0.1 < residual < 10, residual
    assert plain < 0.1 * residual, (plain, residual)


def test_stride_in_either_convolution_has_the_same_names_and_shapes_but_other_outputs():
    nets = [ResNet.Config(layers=(1, 1), base=8, block=Bottleneck.Config(stride_in=where)).build().eval() for where in ("1x1", "3x3")]
    assert {k: v.shape for k, v in nets[0].state_dict().items()} == {k: v.shape for k, v in nets[1].state_dict().items()}
    nets[1].load_state_dict(nets[0].state_dict())
    image = torch.randn(2, 3, 32, 32)
    a, b = (n(image).tokens for n in nets)
    assert a.shape == b.shape and not torch.allclose(a, b, atol=1e-4)


def test_frozen_norms_keep_their_statistics_in_train_mode():
    net = freeze_norm(preset_of("resnet").config.build()).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.classify(torch.randn(4, 3, 28, 28) * 5)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_he_fan_out_initialisation_and_no_dropout():
    net = ResNet.Config(layers=(1, 1), base=64).build()
    weight = net.stages[1][0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (weight.shape[0] * 9)) ** 0.5, rel=0.05)
    assert not any(isinstance(m, torch.nn.Dropout) for m in net.modules())


def test_cifar_form_has_6n_plus_2_layers():
    net = recipe.cifar_form(56, base=16, shortcut=Pad.Config()).build()
    layers = sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in net.modules())
    assert layers == 56 and net.head.in_features == 64
