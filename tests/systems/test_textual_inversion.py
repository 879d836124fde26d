"""Textual inversion's essence (Gal et al. 2023)."""
import numpy as np
import pytest
import torch
from fake import fake_batch

import polysense
from polysense.archetypes.stable_diffusion import unet
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.plan import WordsPlan
from polysense.data.concept import TEMPLATES, concept
from polysense.data.loader import Loader
from polysense.data.tokenizer import load_tokenizer, make_tokenizer
from polysense.decoders.kl_vae import KLVAE
from polysense.nn.norm import GroupNorm
from polysense.pipeline import Pipeline
from polysense.towers.clip import body
from polysense.towers.clip_text import ClipText
from polysense.train.fit import fit
from polysense.weights.concept import read_concept, write_concept

polysense.load("textual_inversion")
WORDS = WordsPlan(vocab=200, length=32, new=(("<it>", 1),))
TINY = preset_of("textual_inversion")
SMALL = TINY.but(config=TINY.config.but(
    vae=KLVAE.Config(widths=(8, 16), depth=1, norm=GroupNorm.Config(groups=4, eps=1e-6)), size=16,
    unet=unet((16, 32), (0,), 24, depth=1, heads=2, groups=8), text=ClipText.Config(vocab=200, length=32, body=body(24, 1, 2), end=2))).but(
    **{"feed.image.size": 16, "feed.train_image.size": 16, "feed.text": WORDS, "stages.0.optim.weight_decay": 0.5})
SAID = ["a red star on the left", "a photo of a circle", *(t.format("star") for t in TEMPLATES["object"])]


def made(**change):
    torch.manual_seed(0)
    system = SMALL.config.but(**change).build()
    with torch.no_grad():
        for p in system.unet.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return system


def tokenizer(plan=WORDS):
    return make_tokenizer(plan, SAID)


def test_it_begins_as_the_coarse_word():
    system = made(like=(7, 9), vectors=2)
    torch.testing.assert_close(system.word.detach(), system.text.embed.weight[[7, 9]].mean(0).expand(2, -1))
    with torch.no_grad():
        system.text.embed.weight[7] += 1
    system.after_start()
    torch.testing.assert_close(system.word.detach(), system.text.embed.weight[[7, 9]].mean(0).expand(2, -1))


def test_after_training_everything_but_the_row_is_bit_identical():
    system, batches = made(), [fake_batch(SMALL, ("image", "text"), seed=i) for i in range(4)]
    before = {n: v.clone() for n, v in system.state_dict().items()}
    list(fit(system, SMALL.stages[0].but(steps=4, batch_size=4), iter(batches)))
    assert {n for n, v in system.state_dict().items() if not torch.equal(v, before[n])} == {"word"}
    assert all(p.grad is None for n, p in system.named_parameters() if n != "word")


def test_every_batch_has_a_gradient_for_the_row_that_passed_both_networks():
    system = made(vectors=1)
    system.choose_trainable(("word",))
    for seed in range(3):
        system.zero_grad()
        system.losses(fake_batch(SMALL, ("image", "text"), seed=seed)).total().backward()
        assert system.word.grad.abs().sum() > 0
    text = fake_batch(SMALL, ("text",))["text"]
    with pytest.raises(UserError, match="no caption"):
        system.losses({"image": torch.randn(4, 3, 16, 16), "text": text.where(text < 200, 5)})


def test_prompts_without_the_word_draw_what_they_drew():
    system, text = made(), torch.tensor([[1, 9, 20, 2]])

    def draw(text):
        torch.manual_seed(1)
        return system.generate_image(text, steps=2)
    plain, named = draw(text), draw(torch.tensor([[1, 9, 200, 2]]))
    with torch.no_grad():
        system.word.add_(1.0)
    assert torch.equal(draw(text), plain) and not torch.equal(draw(torch.tensor([[1, 9, 200, 2]])), named)


def test_the_row_stands_in_for_a_word_exactly():
    """With v* set to the embedding of a word, a prompt that says S* reads like one that says the word."""
    system = made(like=(20,))
    torch.testing.assert_close(system.context(torch.tensor([[1, 9, 200, 2]])), system.context(torch.tensor([[1, 9, 20, 2]])))
    openai = made(like=(20,), text=SMALL.config.text.but(end=None))          # there the end is the largest id of the vocabulary
    assert int(openai.text.last(torch.tensor([[1, 200, 199, 199]]))[0]) == 2


def test_new_words_get_ids_behind_the_vocabulary(tmp_path):
    plain, learned = tokenizer(WORDS.plain), tokenizer()
    assert torch.equal(learned("a red star on the left"), plain("a red star on the left")), "other words keep their ids"
    ids = learned("a photo of a <it> on the left")[0].tolist()
    assert ids.count(200) == 1 and ids[0] == 1 and ids[-1] == 2
    assert [i for i in ids if i != 200] == plain("a photo of a on the left")[0].tolist()
    three = tokenizer(WORDS.but(new=(("<it>", 3), ("<that>", 1))))
    assert [i for i in three("a <it> and <that>")[0].tolist() if i >= 200] == [200, 201, 202, 203]
    assert three(" ".join(["<it>"] * 20)).shape[1] == 32 and three(" ".join(["<it>"] * 20))[0, -1] == 2, "cut, the end stays"
    plain.save(tmp_path)
    assert torch.equal(load_tokenizer(tmp_path, WORDS)("a <it>"), learned("a <it>"))
    with pytest.raises(UserError, match="new word"):
        tokenizer(WORDS.but(new=(("two words", 1),)))


def test_a_folder_of_pictures_becomes_captioned_data(tmp_path):
    from PIL import Image
    for i in range(3):
        Image.fromarray(np.full((20, 20, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    data = concept(tmp_path, "<it>")
    assert len(data) == 3 and all("<it>" in c for c in data.captions())
    batch = next(iter(Loader(data, SMALL.feed, tokenizer(), batch_size=6, needs=("image", "text"))))
    assert (batch["text"] == 200).sum(1).tolist() == [1] * 6 and len({tuple(t) for t in batch["text"].tolist()}) > 1, "several templates"
    assert all("style of" in c for c in concept(tmp_path, "<s>", "style").captions())
    for bad, said in (((tmp_path / "none", "<it>"), "no folder"), ((tmp_path, "<it>", "mood"), "no templates"),
                      ((tmp_path, "<it>", ("a photo",)), "no place"), (([], "<it>"), "no pictures")):
        with pytest.raises(UserError, match=said):
            concept(*bad)


def test_the_word_is_used_from_strings():
    system, words = made(), tokenizer()
    pipeline = Pipeline(system, SMALL, words, id="textual_inversion")
    assert pipeline.generate("a photo of a <it>", steps=2)[0].size == (16, 16)


def test_words_are_shared_as_small_files(tmp_path):
    system = made(vectors=2)
    for name in ("learned_embeds.bin", "learned.safetensors"):
        write_concept(tmp_path / name, {"<it>": system.word.detach()})
        assert torch.equal(read_concept(tmp_path / name, 24)["<it>"], system.word)
    system.known(torch.ones(2, 24))
    assert system.word.eq(1).all()
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "torn.bin").write_bytes(b"PK\x03\x04 not really")
    torch.save({"a": 1}, tmp_path / "none.bin")
    for call, said in ((lambda: read_concept(tmp_path / "empty.bin"), "empty"), (lambda: read_concept(tmp_path / "torn.bin"), "damaged"),
                       (lambda: read_concept(tmp_path / "none.bin"), "no learned words"), (lambda: read_concept(tmp_path / "no.bin"), "no file"),
                       (lambda: read_concept(tmp_path / "learned_embeds.bin", 768), "wide"), (lambda: system.known(torch.ones(1, 24)), "room for"),
                       (lambda: made(like=(500,)), "below 200"), (lambda: write_concept(tmp_path / "x.txt", {}), "ends in")):
        with pytest.raises(UserError, match=said):
            call()
