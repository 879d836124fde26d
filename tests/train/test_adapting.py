"""--adapt: any system, its files, opened with its base, merged; what does not fit is refused."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import polysense
from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.cli import main
from polysense.mechanisms.lora import LowRank
from polysense.mechanisms.nf4 import QuantisedLowRank
from polysense.mechanisms.prefix import VirtualTokens
from polysense.train.adapting import adapted, mechanisms, open_adapter, parse

SMALL = ["vision.image_size=32", "vision.patch=16", "vision.body.depth=1", "text.body.depth=1", "batch_size=8", "feed.image.size=32",
         "feed.train_image.size=32"]
PREPARED = ["--data", "digits", "--workers", "0", "--device", "cpu", "--no-preflight"]


def run(*words):
    return main([str(w) for w in words])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp("adapt") / "base"
    assert run("train", "clip", "--preset", "tiny_vit", *SMALL, *PREPARED, "--steps", 1, "--out", out) == 0
    return out


def features(path):
    pipeline = polysense.open(path, device="cpu")
    with torch.inference_mode():
        return pipeline.system.encode_image(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32))


HOW = {"lora": "lora:rank=2,on=vision.*.q|v", "qlora": "qlora:rank=2,dropout=0.0", "prefix_tuning": "prefix_tuning:tokens=2,on=text",
       "freeze_tuning": "freeze_tuning:last=1,on=vision.*"}


@pytest.fixture(scope="module", params=HOW)
def trained(request, base, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "run"
    assert run("train", "clip", "--preset", "tiny_vit", "--adapt", HOW[request.param], "--base", base, *PREPARED, "batch_size=8", "optim.lr=0.05",
               "optim.warmup=0", "--steps", 2, "--out", out) == 0
    return request.param, out


def test_every_mechanism_is_listed(capsys):
    assert mechanisms() == ["freeze_tuning", "lora", "prefix_tuning", "qlora"]
    assert run("list", "--family", "adapt", "--json") == 0
    assert [c["id"] for c in json.loads(capsys.readouterr().out)] == mechanisms()


def test_words_become_a_configuration():
    assert parse("lora:rank=8,on=vision.*.q|v") == LowRank(rank=8, on="vision.*.q|v")
    assert parse('lora:on="text.*.q",alpha=2') == LowRank(on="text.*.q", alpha=2.0)
    assert parse("qlora") == QuantisedLowRank()
    assert parse("prefix_tuning:tokens=2,at=(0,-1),kind=prompt") == VirtualTokens(tokens=2, at=(0, -1), kind="prompt")


@pytest.mark.parametrize(("text", "wrong"), [("clip", "cannot be put onto"), ("lora:rang=3", "did you mean rank"),
                                             ("lora:rank", "cannot read 'rank'"), ("lora:rank=two", "wrong type")])
def test_words_that_say_nothing_are_refused(text, wrong):
    with pytest.raises(UserError, match=wrong):
        parse(text)


def test_the_plan_survives_a_file_and_quacks_like_the_base():
    from polysense.base.catalogue import preset_of

    plan = adapted("clip", "tiny", preset_of("clip"), "lora:on=text.*.q|v")
    assert from_dict(json.loads(json.dumps(plan.to_dict()))) == plan and plan.config.owner is preset_of("clip").config.owner
    assert plan.config.text == preset_of("clip").config.text and plan.starts[0].into == "" and plan.stages[0].trainable == ("*.lora.default.*",)
    assert "config.adapter.rank = 8" in list(plan.lines())


def test_the_base_is_frozen_and_the_adapter_learned(trained, base):
    how, out = trained
    before, after = load_file(base / "weights.safetensors"), load_file(out / "weights.safetensors")
    same = {k for k in before if k in after and torch.equal(before[k], after[k])}
    if how == "freeze_tuning":
        assert before.keys() - same == {k for k in before if k.startswith("vision.body.blocks.0.")}
    elif how == "qlora":
        assert {k for k in before if k not in after} == {k for k in before if ".blocks." in k and k.endswith("weight") and before[k].ndim == 2}
        assert before.keys() & after.keys() == same
    else:
        assert same == before.keys() and after.keys() > before.keys()


def test_the_adapter_by_itself_and_its_base_are_the_run(trained, base):
    how, out = trained
    folder = out / "adapter"
    assert {p.name for p in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    held = load_file(folder / "adapter_model.safetensors")
    whole = sum(v.numel() for v in load_file(base / "weights.safetensors").values())
    assert sum(v.numel() for v in held.values()) < (0.7 if how == "freeze_tuning" else 0.1) * whole
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["peft_type"] == {"lora": "LORA", "qlora": "LORA", "prefix_tuning": "PREFIX_TUNING", "freeze_tuning": None}[how]
    assert said["base_model_name_or_path"] == str(base)
    assert torch.equal(features(folder), features(out))
    if how != "prefix_tuning":
        assert not torch.equal(features(out), features(base)), "it has learned something"


def test_on_another_base_it_is_refused(trained, base, tmp_path):
    out, other = trained[1], tmp_path / "other"
    shutil.copytree(base, other)
    state = load_file(other / "weights.safetensors")
    save_file({k: v + 1e-3 if k == "text.position" else v for k, v in state.items()}, other / "weights.safetensors")
    with pytest.raises(UserError, match="is not the base that"):
        open_adapter(out / "adapter", base=other)


def test_merged_it_is_a_plain_run_with_the_same_outputs(trained, base, tmp_path, capsys):
    how, out = trained
    if how == "prefix_tuning":
        assert run("merge", out, tmp_path / "merged") == 2 and "cannot be merged" in capsys.readouterr().err
        return
    assert run("merge", out, tmp_path / "merged") == 0
    merged = load_file(tmp_path / "merged" / "weights.safetensors")
    assert merged.keys() == load_file(base / "weights.safetensors").keys()
    torch.testing.assert_close(features(tmp_path / "merged"), features(out), atol=1e-5, rtol=1e-5)
    assert run("merge", base, tmp_path / "none") == 2 and "has no adapter" in capsys.readouterr().err


def test_what_cannot_be_adapted_is_refused_before_anything_is_trained(base, tmp_path, capsys):
    for words, wrong in ((["--adapt", "lora:on=nothing"], "matches no"), (["--base", base], "--adapt"),
                         (["--adapt", "lora", "--base", tmp_path], "not a run folder")):
        assert run("train", "clip", *words, *PREPARED, "--out", tmp_path / "run") == 2
        assert wrong in capsys.readouterr().err
    assert run("train", "slip", "--adapt", "lora", "--base", base, *PREPARED, "--out", tmp_path / "run") == 2
    assert "is a run of clip" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_part_begins_as_that_of_another_run(base, tmp_path, capsys):
    still = ["optim.lr=1e-12", "optim.weight_decay=0.0"]
    words = ["train", "clip", "--preset", "tiny_vit", *SMALL, *PREPARED, *still, "--seed", 5, "--steps", 1, "--out", tmp_path / "mine"]
    assert run(*words, "--begin", f"vision={base}:vision") == 0
    before, after = load_file(base / "weights.safetensors"), load_file(tmp_path / "mine" / "weights.safetensors")
    near = {k: torch.allclose(before[k], after[k], atol=1e-6) for k in before if before[k].is_floating_point()}
    assert all(v for k, v in near.items() if k.startswith("vision.")) and not near["text.embed.weight"]
    assert json.loads((tmp_path / "mine" / "run.json").read_text())["plan"]["starts"][0]["folder"] == str(base)
    assert run("train", "clip", "--out", tmp_path / "mine", "--resume") == 0             # it knows what it stands on

    assert run(*words[:-1], tmp_path / "whole", "--begin", f"={base}") == 0
    whole = load_file(tmp_path / "whole" / "weights.safetensors")
    assert all(torch.allclose(before[k], whole[k], atol=1e-6) for k in before if before[k].is_floating_point())
    capsys.readouterr()
    for said, wrong in (("vision", "cannot read 'vision'"), (f"vision={tmp_path / 'nowhere'}", "nowhere"), (f"vision={base}:text", "vision"),
                        (f"eyes={base}:vision", "nothing called eyes")):
        assert run(*words[:-1], tmp_path / "refused", "--begin", said) == 2
        assert wrong in capsys.readouterr().err and not (tmp_path / "refused" / "weights.safetensors").exists()
    assert run(*words[:-1], tmp_path / "refused", "--begin", f"vision={base}", "--base", base) == 2
