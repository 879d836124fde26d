"""LLaVA's essence (Liu et al. 2023)."""
import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.data import source
from polysense.data.chat import Chat, texts_of
from polysense.data.loader import Loader
from polysense.data.tokenizer import make_tokenizer
from polysense.towers.causal_lm import llama
from polysense.towers.decoding import Beam
from polysense.train.fit import fit

recipe = polysense.load("llava")
SMALL = preset_of("llava").but(**{"config.language": llama(vocab=1008, length=96, width=32, depth=2, heads=2, hidden=48), "config.connector.out": 32})
PLACE = SMALL.config.image_token


@pytest.fixture()
def llava():
    torch.manual_seed(0)
    return SMALL.config.build().eval()


@pytest.fixture(scope="module")
def batch():
    return fake_batch(SMALL, ("image", "brief", "brief_reply", "chat", "chat_reply"), n=3)


@pytest.mark.parametrize("stage", SMALL.stages, ids=lambda s: s.name)
def test_what_each_stage_trains(llava, batch, stage):
    before = {n: p.clone() for n, p in llava.named_parameters()}
    list(fit(llava, stage.but(steps=2, batch_size=3, precision="fp32"), iter([batch] * 2)))
    moved = {n.split(".")[0] for n, p in llava.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"read": {"language"}, "align": {"connector"}, "instruct": {"connector", "language"}}[stage.name]
    if stage.name == "align":
        assert {n for n, p in llava.named_parameters() if p.requires_grad} == {"connector.project.weight", "connector.project.bias"}


def test_the_connector_is_one_matrix_on_every_patch_token(llava, batch):
    seen = llava.vision(batch["image"])
    torch.testing.assert_close(llava.see(batch["image"])[:, 0], seen @ llava.connector.project.weight.T + llava.connector.project.bias)


def test_papers_eye_is_the_last_block_but_one_without_class_token():
    small = {"config.vision.tower.image_size": 28, "config.vision.tower.body.width": 16, "config.vision.tower.body.heads": 2,
             "config.vision.tower.body.depth": 3}
    eye = preset_of("llava", "paper").but(**small).config.vision.build().eval()
    image = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(eye(image), eye.tower.features(image)[1][:, 1:])
    assert eye(image).shape == (2, 4, 16), "2 x 2 patches, no class token"
    paper = preset_of("llava", "paper").config.vision
    assert paper.layer == -2 and (paper.tower.image_size // paper.tower.patch) ** 2 == 256


@torch.no_grad()
def test_splicing_puts_pictures_where_their_places_are(llava):
    image = torch.randn(3, 2, 3, 64, 64)
    text = torch.tensor([[1, 5, PLACE, 6, PLACE, 7], [1, PLACE, PLACE, 8, 2, 0], [1, 9, 10, 2, 0, 0]])
    x, mask, label = llava.splice(image, text, text)
    one, two, p = llava.see(image)[:, 0], llava.see(image)[:, 1], 16
    assert x.shape[1] == 6 - 2 + 2 * p and mask.sum(1).tolist() == [6 - 2 + 2 * p, 5 - 2 + 2 * p, 4]
    word = lambda i: llava.language.embed(torch.tensor([i]))
    torch.testing.assert_close(x[0], torch.cat([word(1), word(5), one[0], word(6), two[0], word(7)]))
    torch.testing.assert_close(x[1, :35], torch.cat([word(1), one[1], two[1], word(8), word(2)]))
    torch.testing.assert_close(x[2, :4], torch.cat([word(1), word(9), word(10), word(2)]))
    assert label[0].tolist() == [1, 5, *[-100] * p, 6, *[-100] * p, 7]
    assert (label[1, 1:33] == -100).all() and (label[~mask] <= 0).all()


@torch.no_grad()
def test_a_text_without_pictures_passes_untouched_and_nothing_is_encoded(llava):
    llava.vision.forward = None
    text = torch.tensor([[1, 5, 6, 7, 2]])
    x, mask, label = llava.splice(torch.randn(1, 3, 64, 64), text, text)
    assert torch.equal(x, llava.language.embed(text)) and mask.all() and torch.equal(label, text)


@torch.no_grad()
def test_a_long_sequence_is_cut_after_splicing(llava):
    text = torch.randint(3, 60, (1, 90))
    text[0, 3] = PLACE
    x, mask, label = llava.splice(torch.randn(1, 3, 64, 64), text, text)
    assert x.shape[1] == mask.shape[1] == label.shape[1] == 96 and label[0, -1] == text[0, 96 - 16]


@torch.no_grad()
def test_loss_is_the_manual_sum_over_answer_tokens_and_blind_to_the_rest(llava, batch):
    image, text, reply = batch["image"], batch["chat"], batch["chat_reply"]
    whole = llava.nll(image, text, reply)
    terms = []
    for i in range(3):
        x, _, _ = llava.splice(image[i:i + 1], text[i:i + 1])
        logp = llava.language.logits(llava.language.read(x)).log_softmax(-1)[0]
        terms += [-logp[t - 1 + 15, text[i, t]] for t in range(12) if reply[i, t]]     # one place became sixteen
    torch.testing.assert_close(whole, torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)
    padded = F.pad(text, (0, 5)), F.pad(reply, (0, 5))
    torch.testing.assert_close(llava.nll(image, *padded), whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="masked"):
        llava.nll(image, text, torch.zeros_like(reply))
    summed = llava.log_likelihood(image, text, reply)
    torch.testing.assert_close(-summed.sum() / reply.sum(), whole, rtol=1e-4, atol=1e-5)


def test_the_reading_stage_sees_no_picture(llava, batch):
    changed = batch | {"image": torch.randn_like(batch["image"])}
    said = [dict(torch.manual_seed(0) and llava.read(b)) for b in (batch, changed)]
    assert said[0] == said[1] and set(said[0]) == {"blind", "told", "brief"}
    assert llava.align(batch)["language"] != llava.align(changed)["language"]
    assert llava.instruct(batch)["language"] != llava.instruct(changed)["language"]


def test_conversations_have_llavas_format():
    data, plan = source("scenes:qa?n=80&size=32"), SMALL.feed.text
    tokenizer = make_tokenizer(plan, texts_of(data, plan))
    chat, feed = Chat(plan, tokenizer), SMALL.feed.but(**{"image.size": 32})
    batch = next(iter(Loader(data, feed, tokenizer, batch_size=40, needs=("image", "brief", "brief_reply", "chat", "chat_reply"))))
    said = [[tokenizer.token(i) for i in row if i != PLACE] for row in batch["brief"].tolist()]
    asked = {" ".join(row[row.index("human</w>"):row.index("assistant</w>")]) for row in said}
    assert len(asked) > 2, "several ways to ask for a brief description"
    before = [row[row.index(PLACE) - 1] == chat.words(":")[0] for row in batch["chat"].tolist()]
    assert any(before) and not all(before), "the picture stands before or after the first question, at random"
    assert ((batch["chat"] == PLACE).sum(1) == 1).all(), "later turns have none"
    ends = (batch["chat"] == 2).sum(1)
    assert (ends >= 2).all() and ((batch["chat"] == 2) & batch["chat_reply"]).sum() * 2 == ends.sum(), "every part ends"


@torch.no_grad()
def test_writing_is_the_same_in_a_batch_and_alone(llava):
    image, prompt = torch.randn(2, 3, 64, 64), torch.tensor([[1, PLACE, 5, 6, 7], [1, PLACE, 8, 0, 0]])
    for how in (None, Beam.Config(beams=3)):
        both = llava.generate_text(image, prompt, max_new=6, how=how)
        alone = llava.generate_text(image[1:], prompt[1:, :3], max_new=6, how=how)
        assert both[1, :alone.shape[1]].tolist() == alone[0].tolist()
    plain, placed = (llava.generate_text(image[1:], torch.tensor([row]), max_new=6) for row in ([1, 8], [1, PLACE, 8]))
    assert plain.tolist() == placed.tolist(), "without a place: behind the first token"


def test_bad_input_is_refused(llava):
    image = torch.randn(2, 3, 64, 64)
    for wrong, said in ((lambda: llava.generate_text(image[:1], torch.tensor([[1, 5]] * 2), max_new=2), "2 texts"),
                        (lambda: llava.generate_text(image, torch.tensor([[1, PLACE, PLACE, 5]] * 2), max_new=2), "places"),
                        (lambda: llava.generate_text(image[:, :1], torch.tensor([[1, 5]] * 2), max_new=2), "channels"),
                        (lambda: llava.generate_text(image[0], torch.tensor([[1, 5]] * 3), max_new=2), "shape"),
                        (lambda: llava.generate_text(image, torch.tensor([[1, 5000]] * 2), max_new=2), "vocabulary"),
                        (lambda: llava.generate_text(image, torch.randn(2, 4), max_new=2), "int64"),
                        (lambda: llava.generate_text(image, torch.full((2, 80), 5), max_new=30), "at most 96"),
                        (lambda: llava.generate_text(image * torch.nan, torch.tensor([[1, 5]] * 2), max_new=2), "finite")):
        with pytest.raises(UserError, match=said):
            wrong()
