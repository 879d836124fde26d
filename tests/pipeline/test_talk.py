"""Captions, answers and conversations from files and strings."""
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.plan import PromptPlan
from polysense.base.system import Spec, System, final
from polysense.data import source
from polysense.data.chat import texts_of
from polysense.data.tokenizer import make_tokenizer
from polysense.pipeline import Pipeline
from polysense.pipeline.talk import strategy, turns_of
from polysense.towers.causal_lm import llama


@final
class Echo(System):
    """Writes back what it was asked, without the start."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 1

    def __init__(self, c):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(c.width))

    def generate_text(self, image, prompt, *, max_new):
        return prompt[:, 1:1 + max_new]


DATA = source("scenes:qa?n=60&size=32")


@pytest.fixture(scope="module")
def llava():
    language = llama(vocab=1008, length=128, width=32, depth=1, heads=2, hidden=48)
    plan = preset_of("llava").but(**{"config.language": language, "config.connector.out": 32})
    torch.manual_seed(0)
    return Pipeline(plan.config.build(), plan, make_tokenizer(plan.feed.text, texts_of(DATA, plan.feed.text)), id="llava", device="cpu")


@pytest.fixture(scope="module")
def echo():
    base = preset_of("llava")
    words = PromptPlan(vocab=600, length=60, ask="question: {} answer:", describe="a photo of")
    plan = base.but(config=Echo.Config(), feed=base.feed.but(text=words))
    return Pipeline(plan.config.build(), plan, make_tokenizer(words, texts_of(DATA, words)), id="echo", device="cpu")


def test_captions_answers_and_replies_are_strings(llava, tmp_path):
    picture = Image.fromarray(DATA[0]["image"])
    picture.save(tmp_path / "a.png")
    captions = llava.caption([tmp_path / "a.png", picture, np.asarray(picture)], max_new=5)
    assert len(captions) == 3 and len(set(captions)) == 1 and isinstance(captions[0], str)
    assert llava.caption(picture, max_new=5) == captions[:1], "a single picture counts as a list of one"
    assert llava.ask(tmp_path / "a.png", "what colour is the circle?", max_new=5) == llava.chat(picture, ["what colour is the circle?"], max_new=5)
    said = [{"role": "user", "content": "is it red?"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "large?"}]
    assert llava.chat(picture, said, max_new=5) == llava.chat(picture, ["is it red?", "yes", "large?"], max_new=5)
    for how in ("beam:2", "sample:0.9"):
        assert isinstance(llava.ask(picture, "what is it?", max_new=4, how=how, seed=1), str)
    assert llava.caption([picture] * 3, max_new=5, batch_size=2) == [captions[0]] * 3


def test_without_a_template_the_feeds_prompts_are_used(echo):
    picture = Image.fromarray(DATA[0]["image"])
    assert echo.caption(picture) == ["a photo of"]
    assert echo.ask(picture, "what colour is it?").replace(" ", "") == "question:whatcolourisit?answer:"
    assert echo.chat(picture, ["is it red?", "yes", "large?"]).replace(" ", "") == "question:isitred?answer:yesquestion:large?answer:"


def test_what_cannot_be_done_is_said_in_one_line(llava, echo, tmp_path):
    picture = Image.fromarray(DATA[0]["image"])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and then nothing")
    clip = Pipeline(preset_of("resnet").config.build(), preset_of("resnet"), None, id="resnet", device="cpu")
    for wrong in (lambda: clip.caption(picture), lambda: clip.ask(picture, "what?"), lambda: llava.ask(picture, " "), lambda: llava.chat(picture, []),
                  lambda: llava.chat(picture, ["a", "b"]), lambda: llava.chat(picture, [{"role": "assistant", "content": "a"}]),
                  lambda: llava.chat(picture, [3]), lambda: llava.ask(picture, "what?", how="dream"),
                  lambda: llava.ask(picture, "what?", how="beam:x"), lambda: llava.ask(picture, "what?", max_new=0),
                  lambda: llava.ask(picture, "what? " * 300), lambda: llava.caption([]),
                  lambda: echo.ask(picture, "what?", how="beam:2"), lambda: llava.caption([tmp_path / "empty.png"]),
                  lambda: llava.ask(tmp_path / "broken.png", "what?"), lambda: llava.ask(tmp_path / "none.png", "what?")):
        with pytest.raises(UserError) as caught:
            wrong()
        assert "\n" not in str(caught.value)


def test_examples_are_for_systems_that_read_pictures_in_turn(llava):
    plan = preset_of("flamingo")
    torch.manual_seed(0)
    flamingo = Pipeline(plan.config.build(), plan, make_tokenizer(plan.feed.text, texts_of(DATA, plan.feed.text)), id="flamingo", device="cpu")
    with torch.no_grad():
        for name, p in flamingo.system.named_parameters():
            if ".look.gate" in name:
                p.fill_(1.0)
    pictures, seen = [Image.fromarray(DATA[i]["image"]) for i in range(4)], []
    write, flamingo.system.generate_text = flamingo.system.generate_text, lambda *a, **k: seen.append(a) or write(*a, **k)
    said = flamingo.caption(pictures[2:], examples=[(pictures[0], "one"), (pictures[1], "two")], max_new=4)
    image, prompt = seen[0]
    assert len(said) == 2 and image.shape[:2] == (2, 3) and torch.equal(image[0, :2], image[1, :2]) and not torch.equal(image[0, 2], image[1, 2])
    words = lambda t: flamingo.tokenizer([t])[0].tolist()[1:]
    assert prompt[0].tolist() == [1, 1000, *words("one"), 1000, *words("two"), 1000]
    assert flamingo.caption(pictures[:1], max_new=4) and isinstance(flamingo.ask(pictures[0], "what is it?", max_new=3), str)
    with pytest.raises(UserError, match="one picture at a time"):
        llava.caption(pictures[:1], examples=[(pictures[1], "one")])
    with pytest.raises(UserError, match="do not fit"):
        flamingo.caption(pictures[:1], examples=[(pictures[1], "one " * 100)] * 3)


def test_weights_that_are_not_numbers_are_told(llava):
    import copy

    damaged = copy.deepcopy(llava.system)
    with torch.no_grad():
        damaged.language.embed.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="finite"):
        Pipeline(damaged, llava.preset, llava.tokenizer, id="llava", device="cpu").caption(Image.fromarray(DATA[0]["image"]))


def test_ways_of_writing_and_turns():
    assert strategy("greedy") is None and strategy("beam:3").beams == 3 and strategy("sample:0.5", 4).seed == 4
    assert turns_of(["a", "b", "c"]) == [("a", "b"), ("c", None)]
