"""LLaVA-1.5's essence (Liu et al. 2024). Splicing, masks and writing are VisualLM's, tested with LLaVA."""
import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.connectors.linear import LinearConnector
from polysense.connectors.mlp import MLPConnector
from polysense.data import source
from polysense.data.chat import Chat, texts_of
from polysense.data.tokenizer import make_tokenizer
from polysense.towers.causal_lm import llama
from polysense.train.fit import fit

recipe = polysense.load("llava_1_5")
SMALL = preset_of("llava_1_5").but(**{
    "config.language": llama(vocab=1008, length=96, width=32, depth=2, heads=2, hidden=48), "config.connector.out": 32})


@pytest.fixture()
def llava():
    torch.manual_seed(0)
    return SMALL.config.build().eval()


@pytest.fixture(scope="module")
def batch():
    return fake_batch(SMALL, ("image", "text", "chat", "chat_reply"), n=3)


def test_connector_is_linear_gelu_linear(llava, batch):
    x, c = llava.vision(batch["image"]), llava.connector.mlp
    torch.testing.assert_close(llava.see(batch["image"])[:, 0], F.linear(F.gelu(F.linear(x, c.up.weight, c.up.bias)), c.down.weight, c.down.bias))
    paper = preset_of("llava_1_5", "paper").config
    with torch.device("meta"):
        built = paper.connector.build().mlp
    assert built.up.weight.shape == (4096, 1024) and built.down.weight.shape == (4096, 4096)
    assert (paper.vision.tower.image_size // paper.vision.tower.patch) ** 2 == 576 and paper.vision.layer == -2


def test_without_gelu_and_with_an_identity_it_is_llavas_linear():
    class Straight(torch.nn.Module):
        def forward(self, x):
            return x

    mlp, one = MLPConnector.Config(into=5, out=7).build(), LinearConnector.Config(into=5, out=7).build()
    mlp.mlp.act = Straight()
    with torch.no_grad():
        mlp.mlp.down.weight.copy_(torch.eye(7))
        mlp.mlp.down.bias.zero_()
        one.project.load_state_dict(mlp.mlp.up.state_dict())
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(mlp(x), one(x))


@pytest.mark.parametrize("stage", SMALL.stages, ids=lambda s: s.name)
def test_what_each_stage_trains(llava, batch, stage):
    before = {n: p.clone() for n, p in llava.named_parameters()}
    list(fit(llava, stage.but(steps=2, batch_size=3, precision="fp32"), iter([batch] * 2)))
    moved = {n.split(".")[0] for n, p in llava.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"read": {"language"}, "align": {"connector"}, "instruct": {"connector", "language"}}[stage.name]


@torch.no_grad()
def test_alignment_learns_the_bare_caption_behind_the_picture(llava, batch):
    text, total = batch["text"], []
    for i in range(3):
        x = torch.cat([llava.language.embed(text[i:i + 1, :1]), llava.see(batch["image"][i:i + 1])[:, 0], llava.language.embed(text[i:i + 1, 1:])], 1)
        logp = llava.language.logits(llava.language.read(x))[0].log_softmax(-1)
        total += [-logp[15 + t, text[i, t]] for t in range(1, 8)]
    torch.testing.assert_close(llava.align(batch)["language"], torch.stack(total).mean(), rtol=1e-4, atol=1e-5)


def test_pictures_are_padded_and_short_answers_asked_for():
    plan = preset_of("llava_1_5", "paper").feed
    assert plan.image.fit == "pad" and "single word or phrase" in plan.text.short
    first, second = preset_of("llava_1_5", "paper_align"), preset_of("llava_1_5", "paper")
    assert first.feed.image.fit == "crop", "the first stage has CLIP's own way to read pictures"
    assert [(s.name, s.batch_size, s.optim.lr) for p in (first, second) for s in p.stages] == [("align", 256, 1e-3), ("instruct", 128, 2e-5)]
    assert all(("connector", "paper_align") in {(s.into, s.preset) for s in preset_of("llava_1_5", n).starts} for n in ("paper", "hd"))
    data, small = source("scenes:qa?n=40&size=32"), SMALL.feed.text.but(short="answer in one word.", turns=3)
    chat = Chat(small, make_tokenizer(small, texts_of(data, small)))
    about = data.about(0)
    ids, learned = chat.of_questions(about, None)
    said = [chat.words(f"{q} answer in one word.") for q, _ in about["qa"][:3]]
    assert all(" ".join(map(str, s)) in " ".join(map(str, ids)) for s in said), "the format is said behind every question"
    assert sum(learned) == sum(len(chat.words(a)) + 1 for _, a in about["qa"][:3]), "questions about one picture are merged into one conversation"


@torch.no_grad()
def test_hd_reads_tiles_one_by_one_merges_their_grids_and_adds_the_whole():
    class Eye(torch.nn.Module):
        """The mean colour of each of 2 x 2 patches, and whether the picture is a tile."""
        def forward(self, image):
            return F.adaptive_avg_pool2d(image, 2).flatten(2).mT

    tiles = recipe.Tiles(recipe.Tiles.Config(eye=SMALL.config.vision))
    tiles.eye = Eye()
    image = torch.randn(2, 3, 32, 32)
    out = tiles(image)
    torch.testing.assert_close(out[:, :16], F.adaptive_avg_pool2d(image, 4).flatten(2).mT, msg="one grid of 4 x 4, row by row")
    small = F.interpolate(image, (16, 16), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(out[:, 16:], Eye()(small))
    hd = preset_of("llava_1_5", "hd")
    assert hd.feed.image.size == 448 and hd.config.vision.eye.tower.image_size == 224


@torch.no_grad()
def test_hd_shows_all_its_tokens_to_the_language_model():
    config = SMALL.config.but(vision=recipe.Tiles.Config(eye=SMALL.config.vision))
    llava = config.build().eval()
    x, mask, _ = llava.splice(torch.randn(1, 3, 128, 128), torch.tensor([[1, config.image_token, 5]]))
    assert x.shape[1] == 2 + 5 * 16 and mask.all()
    assert llava.generate_text(torch.randn(1, 3, 128, 128), torch.tensor([[1, 5]]), max_new=2).shape[1] <= 2
