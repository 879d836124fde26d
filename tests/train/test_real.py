"""A system of the catalogue on real digits, through the whole of `train`: data, tokenizer, resume, opening, torch-level errors."""
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from polysense.base.errors import UserError
from polysense.base.plan import Feed, ImagePlan, Optim, Preset, Stage, Start, TextPlan, ViewPlan
from polysense.nn.position import fit_positions
from polysense.systems.align.clip import CLIP, body, config
from polysense.train import starts
from polysense.train.run import Finished, Saved, Started, Stepped, load_run, override, train, train_preset

SMALL = Preset(
    data="digits", config=config(16, 8, body(32, 1, 2), body(32, 1, 2), dim=24, vocab=4096, length=48, end=2),
    feed=Feed(image=ImagePlan(size=16), train_image=ViewPlan(size=16, scale=(0.6, 1.0), flip=0.5), text=TextPlan(vocab=4096, length=48)),
    stages=(Stage(objective=CLIP.compare, embed=CLIP.embed, steps=6, batch_size=8, optim=Optim(lr=1e-3, weight_decay=0.2, clip=1.0)),))


def clip(out, changes=None, **options):
    return train_preset("clip", override(SMALL, changes or {}), ("image", "text"), out=out, device="cpu", **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("clip") / "run"
    return out, list(clip(out))


def test_a_resumed_clip_is_bit_identical(whole, tmp_path):
    out, events = whole
    assert isinstance(events[0], Started) and events[0].data == "digits" and sum(isinstance(e, Stepped) for e in events) == 6
    for event in clip(tmp_path / "run", checkpoint_every=2):
        if isinstance(event, Saved):
            break
    [started, *_, finished] = clip(tmp_path / "run", resume=True)
    assert started.done == 2 and isinstance(finished, Finished)
    one, two = (load_file(p / "weights.safetensors") for p in (out, tmp_path / "run"))
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    assert (out / "weights.safetensors").read_bytes() == (tmp_path / "run" / "weights.safetensors").read_bytes()
    assert (out / "tokenizer" / "tokenizer.json").read_bytes() == (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes()


def test_the_run_opens_without_being_told_what_it_is(whole):
    run = load_run(whole[0])
    assert run.id == "clip" and run.preset == SMALL
    with torch.inference_mode():
        features = run.system.encode_text(run.tokenizer(["the digit seven", "the digit two"]))
    assert features.shape == (2, 24) and not run.system.training


def test_what_does_not_fit_together_is_said_before_the_first_step(tmp_path):
    for options, said in (({"changes": {"feed.text.vocab": 8000, "text.vocab": 40}}, "tokens, but config.text.vocab=40"),
                          ({"changes": {"batch_size": 5000}}, "a batch of 5000 is larger than digits"),
                          ({"changes": {"optim.name": "adamm"}}, "no optimiser 'adamm'"),
                          ({"changes": {"precision": "fp8"}}, "no precision 'fp8'"),
                          ({"split": "nowhere"}, "split")):
        with pytest.raises(UserError, match=said) as caught:
            list(clip(tmp_path / said[:5], **options))
        assert "\n" not in str(caught.value)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="offers no text"):
        list(train("clip", data=str(tmp_path / "a.png").rpartition("/")[0], out=tmp_path / "none"))


def test_a_start_at_another_resolution_gets_interpolated_positions(whole):
    run = load_run(whole[0])
    bigger = run.preset.but(**{"config.vision.image_size": 32}).config.build()
    starts.carry(Start(into="", from_="clip"), run, bigger)
    want = fit_positions(run.system.vision.position, 1, (4, 4))
    assert bigger.vision.position.shape == (1, 17, 32) and torch.equal(bigger.vision.position, want)
    wider = run.preset.but(**{"config.text.length": 50}).config.build()
    with pytest.raises(UserError, match=r"text\.position is \(1, 48, 32\), not \(1, 50, 32\)"):
        starts.carry(Start(into="", from_="clip"), run, wider)
