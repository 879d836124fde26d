"""lpips= of `polysense exam RUN views`: published files in, one more number out."""
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from polysense.base.errors import UserError
from polysense.cli import main
from polysense.cli.options import exam_options, perceptual
from polysense.data import source
from polysense.decoders.perceptual import Perceptual, vgg_rows
from polysense.weights.lpips import write_perceptual

SMALL = Perceptual.Config(rows=vgg_rows((1, 2), base=4), seen=(0, 2))


class Grey(nn.Module):
    def render_view(self, origin, direction):
        return torch.full_like(origin, 0.5)


class Subject:
    system, device, preset, id = Grey(), torch.device("cpu"), None, "grey"


@pytest.fixture()
def file(tmp_path):
    torch.manual_seed(0)
    part = SMALL.build()
    for w in part.weigh:
        w.copy_(torch.rand_like(w))
    state = {k: v.contiguous().clone() for k, v in write_perceptual(part, SMALL).items()}
    save_file(state, tmp_path / "vgg.safetensors")
    return part, tmp_path / "vgg.safetensors"


def test_the_exam_of_views_measures_it_with_the_weights_of_a_file(file, monkeypatch, capsys):
    part, path = file
    monkeypatch.setattr("polysense.open", lambda *args, **more: Subject())
    monkeypatch.setattr("polysense.cli.options.perceptual", lambda paths: perceptual(paths, SMALL))
    data = "solids?views=2&size=8&seed=1"
    assert main(["exam", "anything", "views", f"lpips={path}", "--data", data, "--split", "test", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["metrics"]
    views = torch.from_numpy(source(data, "test").cameras.image).float().permute(0, 3, 1, 2) * 2 - 1
    with torch.no_grad():
        want = part(torch.zeros_like(views), views).mean()
    assert said["lpips"]["value"] == pytest.approx(float(want), rel=1e-4) and {"psnr", "ssim"} <= set(said)
    assert main(["exam", "anything", "views", "--data", data, "--split", "test", "--json"]) == 0
    assert "lpips" not in json.loads(capsys.readouterr().out)["metrics"]


def test_what_cannot_be_measured_is_said_in_one_line(file, tmp_path):
    with pytest.raises(UserError, match="exams views and reconstruction"):
        exam_options("zero_shot", ["lpips=a.pth"])
    with pytest.raises(UserError, match="names no file"):
        exam_options("views", ["lpips="])
    with pytest.raises(UserError):
        perceptual([str(tmp_path / "none.pth")], SMALL)
    assert exam_options("few_shot", ["seed=1", "k=5"]) == {"seed": 1, "k": 5}
