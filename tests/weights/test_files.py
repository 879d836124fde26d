"""Reading what others wrote, safely, and writing so that nobody reads half a file."""
import json
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.align import clip
from polysense.weights import files
from polysense.weights.convert import CAUSES, export, import_
from polysense.weights.convert import compare as assert_agree
from polysense.weights.layout import read_checkpoint, write_checkpoint
from polysense.weights.signs import SIGNS, recognise
from polysense.weights.torchscript import is_torchscript, read_torchscript

HF, OPENAI, OPEN_CLIP = (clip.weights[n] for n in ("hf", "openai", "open_clip"))


class Bomb:
    def __init__(self, at: Path):
        self.at = at

    def __reduce__(self):
        return (Path.touch, (self.at,))


def tiny_clip() -> clip.CLIP.Config:
    body = clip.body(32, 1, 2)
    return clip.config(32, 8, body, body, dim=16, vocab=40, length=8)


def presets(name: str):
    return preset_of("clip", name)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A CLIP in the layout hf."""
    folder = tmp_path_factory.mktemp("published") / "clip"
    torch.manual_seed(0)
    config = tiny_clip()
    return export(config.build().state_dict(), config, HF, folder)


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_a_truncated_file_an_empty_one_and_a_flipped_header_are_refused(published, tmp_path):
    whole = (published / "model.safetensors").read_bytes()
    for name, data in (("cut", whole[:len(whole) // 2]), ("empty", b""), ("head", b"\xff" * 8 + whole[8:]), ("text", b"<html>404</html>")):
        folder = copy(published, tmp_path / name)
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(UserError, match="empty" if name == "empty" else "damaged or cut short"):
            read_checkpoint(folder, HF)
    torch.save(load_file(published / "model.safetensors"), tmp_path / "a.pt")
    half = (tmp_path / "a.pt").read_bytes()
    for data in (half[:len(half) // 2], b"no pickle at all", b"\x80\x02"):
        (tmp_path / "b.pt").write_bytes(data)
        with pytest.raises(UserError, match=r"damaged|not a weights file|was not read"):
            files.read_state(tmp_path / "b.pt")


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, how):
    path, mark = tmp_path / "evil.bin", tmp_path / "ran"
    if how == "torch":
        torch.save({"visual.conv1.weight": torch.zeros(1), "x": Bomb(mark)}, path)
    else:
        path.write_bytes(pickle.dumps({"x": Bomb(mark)}))
    with pytest.raises(UserError, match=r"would run code.*safetensors"):
        files.read_state(path)
    assert not mark.exists()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.bn, self.two = nn.Linear(3, 2), nn.BatchNorm1d(2), nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Embedding(4, 2)])
        self.low = nn.Parameter(torch.randn(2).half())
        self.two[0].weight = nn.Parameter(torch.randn(2, 2).T)                          # not contiguous

    def forward(self, x):
        return self.two[0](self.bn(self.fc(x))) + self.low + self.two[1](torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("how", ["trace", "script"])
def test_torchscript_tensors_are_read_without_the_code(tmp_path, how, monkeypatch):
    net = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.trace(net, torch.randn(2, 3)) if how == "trace" else torch.jit.script(net.bn)
        made.save(str(tmp_path / "a.pt"))
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("the code was loaded"))
    monkeypatch.setattr(torch._C, "import_ir_module", lambda *a, **k: pytest.fail("the code was loaded"))
    assert is_torchscript(tmp_path / "a.pt")
    want, got = (net if how == "trace" else net.bn).state_dict(), files.read_state(tmp_path / "a.pt")
    assert got.keys() == want.keys() and all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in want.items())


def test_a_torchscript_archive_that_names_anything_else_is_refused(tmp_path):
    mark = tmp_path / "ran"
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Bomb(mark)))
        archive.writestr("a/constants.pkl", b"")
    with pytest.raises(UserError, match="cannot read the TorchScript archive"):
        read_torchscript(tmp_path / "evil.pt")
    assert not mark.exists()


def test_wrappers_of_training_runs_are_taken_off(tmp_path):
    state = {"visual.conv1.weight": torch.randn(2)}
    for wrapped in ({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, {"model": state}, state):
        torch.save(wrapped, tmp_path / "a.pt")
        assert torch.equal(files.read_state(tmp_path / "a.pt")["visual.conv1.weight"], state["visual.conv1.weight"])
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="no tensors"):
        files.read_state(tmp_path / "a.pt")


def test_the_wrong_layout_names_the_right_one(published, tmp_path):
    with pytest.raises(UserError, match=r"not clip in the layout 'open_clip'.*looks like clip/hf"):
        read_checkpoint(published, OPEN_CLIP)
    config = tiny_clip().but(**{"vision.body.heads": 1, "text.body.heads": 1})
    export(config.build().state_dict(), config, OPENAI, tmp_path / "a.pt")
    with pytest.raises(UserError, match="looks like clip/openai or clip/open_clip"):
        read_checkpoint(tmp_path / "a.pt", HF)
    assert recognise(["layer1.0.conv1.weight"]) == ["resnet/timm", "simclr/torchvision"]      # without its head, SimCLR is a ResNet
    assert recognise(["bert.embeddings.word_embeddings.weight"]) == ["bert/hf"] and ("bert", "hf") in SIGNS


def test_missing_keys_wrong_shapes_and_wrong_configurations(published, tmp_path):
    state, config = load_file(published / "model.safetensors"), json.loads((published / "config.json").read_text())
    name = "vision_model.post_layernorm.bias"

    def broken(case: str, state: dict, config: dict | None) -> Path:
        folder = tmp_path / case
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    for case, changed, of, words in (
            ("lost", {k: v for k, v in state.items() if k != name}, config, rf"lacks vision\.body\.norm\.bias \(theirs: {name}\)"),
            ("more", {**state, "logit_bias": torch.zeros(1)}, config, r"logit_bias has no place"),
            ("size", {**state, name: torch.zeros(31)}, config, r"vision\.body\.norm\.bias.*\[31\] in the file and \[32\] here"),
            ("image", state, {**config, "vision_config": {**config["vision_config"], "image_size": 64}}, "position.*image_size and patch"),
            ("none", state, None, r"config\.json is missing"), ("kind", state, {"model_type": "siglip"}, "siglip"),
            ("act", state, {**config, "text_config": {**config["text_config"], "hidden_act": "mish"}}, "mish.*known are")):
        with pytest.raises(UserError, match=words):
            import_(broken(case, changed, of), HF, presets)
    (tmp_path / "lost" / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_checkpoint(tmp_path / "lost", HF)


def test_places_without_a_checkpoint(tmp_path, published, monkeypatch):
    with pytest.raises(UserError, match="no weights"):
        read_checkpoint(tmp_path, HF)
    for place in (tmp_path / "nowhere", "a/b.safetensors"):
        with pytest.raises(UserError, match="no checkpoint at"):
            read_checkpoint(place, HF)
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"several weights: a\.pt, b\.pt"):
        read_checkpoint(tmp_path, HF)
    (tmp_path / "w.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match="not a kind of weights file"):
        read_checkpoint(tmp_path / "w.onnx", HF)

    import huggingface_hub

    def offline(*args, **kw):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"cannot fetch 'owner/name' from the hub \(no route to host\)"):
        read_checkpoint("owner/name", HF)
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: asked.update(kw, name=name) or str(published))
    assert read_checkpoint("owner/name@v1", HF)[0]["model_type"] == "clip"
    assert asked["name"] == "owner/name" and asked["revision"] == "v1" and "*.safetensors" in asked["allow_patterns"]


def test_an_index_of_shards_may_not_point_outside_its_folder(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "f"
    folder.mkdir()
    for name, words in (("../secret.safetensors", "outside"), ("gone.safetensors", "no file")):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match=words):
            files.read_state(folder / "model.safetensors.index.json")
    save_file({"a": torch.zeros(1)}, folder / "s.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "s.safetensors", "b": "s.safetensors"}}))
    with pytest.raises(UserError, match="lack b"):
        files.read_state(folder / "model.safetensors.index.json")


def test_a_write_that_dies_leaves_the_old_file_and_no_rubbish(published, tmp_path, monkeypatch):
    old = copy(published, tmp_path / "old")
    before = {p.name: p.read_bytes() for p in old.iterdir()}

    def die(state, path, **kw):
        Path(path).write_bytes(b"half a fi")
        raise OSError("disk full")
    monkeypatch.setattr(files, "save_file", die)
    config = tiny_clip()
    for place in (old, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            export(config.build().state_dict(), config, HF, place)
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old"]


def test_what_is_written_has_the_published_shape(published, tmp_path):
    config, state = read_checkpoint(published, HF)
    assert {p.name for p in published.iterdir()} == {"config.json", "model.safetensors"}
    config["preprocessor_config"] = {"resample": 3}
    write_checkpoint(tmp_path / "out", config, state, HF)
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == {"resample": 3}
    assert "preprocessor_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = read_checkpoint(tmp_path / "out", HF)
    assert again[0] == config and all(torch.equal(v, again[1][k]) for k, v in state.items())
    with pytest.raises(UserError, match="give a folder"):
        write_checkpoint(tmp_path / "out.safetensors", config, state, HF)
    with pytest.raises(UserError, match="is a file"):
        write_checkpoint(tmp_path / "out" / "config.json", config, state, HF)


def test_compare_measures_and_names_the_usual_causes():
    a = torch.tensor([1.0, 200.0])
    assert assert_agree({"x": a}, {"x": a}) == 0 and assert_agree({"x": a}, {"x": a + torch.tensor([0.0, 0.002])}) == pytest.approx(1e-5, rel=0.1)
    for other, words in ((a + 1, "x differs by"), (torch.full_like(a, torch.nan), "x differs by inf"), (a[:1], "shape"), (None, "outputs")):
        with pytest.raises(UserError, match=words):
            assert_agree({"x": a}, {"x": other} if other is not None else {"y": a})
    with pytest.raises(UserError) as error:
        assert_agree({"x": a}, {"x": a + 1})
    assert all(cause in str(error.value) for cause in CAUSES)
