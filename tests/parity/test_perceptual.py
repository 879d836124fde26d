"""The perceptual distance against the package `lpips`: distances, and files of both shapes. 1e-4 absolute."""
import pytest
import torch
from reference import reference, shake

from polysense.base.errors import UserError
from polysense.decoders.perceptual import Perceptual
from polysense.weights.lpips import load_perceptual, write_perceptual


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    net = reference("lpips").LPIPS(net="vgg", pnet_rand=True, verbose=False)
    shake(net.net)
    return net.eval()


@pytest.fixture()
def pictures():
    torch.manual_seed(1)
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    return x, (x + 0.3 * torch.randn_like(x)).clamp(-1, 1)


@torch.no_grad()
def test_the_whole_state_in_and_out(theirs, pictures, tmp_path):
    """Its linears are those that the package brings along: learned ones."""
    config = Perceptual.Config()
    ours = config.build()
    torch.save(theirs.state_dict(), tmp_path / "lpips.pth")
    load_perceptual(ours, config, tmp_path / "lpips.pth")
    want = theirs(*pictures).flatten()
    assert float(want.min()) > 0.01
    torch.testing.assert_close(ours(*pictures), want, rtol=0, atol=1e-4)
    back = reference("lpips").LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval()
    written = write_perceptual(ours, config)
    twice = {k.replace("lin", "lins.", 1): v for k, v in written.items() if k.startswith("lin")}      # theirs are registered under two names
    missing, extra = back.load_state_dict(written | twice, strict=False)
    assert not extra and all("scaling" in k for k in missing)
    torch.testing.assert_close(back(*pictures).flatten(), want, rtol=0, atol=1e-6)


@torch.no_grad()
def test_linears_beside_a_published_vgg(theirs, pictures, tmp_path):
    config = Perceptual.Config()
    ours = config.build()
    trunk = {"features." + k.split(".", 1)[1]: v for k, v in theirs.net.state_dict().items()}
    torch.save(trunk | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg16.pth")
    torch.save({k: v for k, v in theirs.state_dict().items() if k.startswith("lin") and not k.startswith("lins")}, tmp_path / "vgg.pth")
    load_perceptual(ours, config, tmp_path / "vgg.pth", tmp_path / "vgg16.pth")
    torch.testing.assert_close(ours(*pictures), theirs(*pictures).flatten(), rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="without a network"):
        load_perceptual(ours, config, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="no linears"):
        load_perceptual(ours, config, tmp_path / "vgg16.pth")
    with pytest.raises(UserError, match="no file"):
        load_perceptual(ours, config, tmp_path / "absent.pth")
