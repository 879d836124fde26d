"""DALL-E's essence (Ramesh et al. 2021, section 2 and appendix B)."""
import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch
from PIL import Image

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.plan import DropoutPlan
from polysense.cli import main
from polysense.nn.sparse import KINDS, pattern, patterns
from polysense.train.fit import fit
from polysense.train.run import train_preset

recipe = polysense.load("dalle")
SIDE, TEXT = 4, 8


def toy(**changes):
    plan = preset_of("dalle").but(**{
        "config.codec": recipe.dvae(16, 8, 3, 1, 8), "config.body": recipe.body(32, 4, 2, TEXT, SIDE, kernel=3), "config.text_vocab": 64,
        "config.text_length": TEXT, "config.side": SIDE, "feed.image.size": 16, "feed.train_image.size": 16})
    return plan.but(**changes)


@pytest.fixture()
def dalle():
    torch.manual_seed(0)
    return toy().config.build().eval()


@pytest.fixture(scope="module")
def batch():
    made = fake_batch(toy(), ("image", "text"), n=3)
    return {"image": made["image"].sigmoid(), "text": made["text"]}


# -- the stream -------------------------------------------------------------------------------------------------------------------------

def test_every_text_position_has_its_own_padding_token_which_is_read_and_predicted(dalle):
    text = torch.tensor([[1, 9, 8, 2, 2, 2], [1, 9, 8, 2, 0, 0], [1, 5, 6, 7, 8, 2]])
    padded = dalle.padded(text)
    assert padded[0].tolist() == [1, 9, 8, 2, 64 + 4, 64 + 5, 64 + 6, 64 + 7]
    assert torch.equal(padded[0], padded[1]), "however the tokenizer pads"
    assert padded[2].tolist() == [1, 5, 6, 7, 8, 2, 64 + 6, 64 + 7]
    words, _ = dalle.logits(padded, torch.zeros(3, 16, dtype=torch.long))
    assert words.shape == (3, TEXT - 1, 64 + TEXT)


def test_an_image_token_knows_its_row_and_its_column(dalle):
    codes = torch.zeros(1, 16, dtype=torch.long)
    got = dalle.embed_codes(codes)[0]
    for i in range(16):
        torch.testing.assert_close(got[i], dalle.codes.weight[0] + dalle.row.weight[i // 4] + dalle.column.weight[i % 4])
    torch.testing.assert_close(dalle.embed_codes(codes[:, :1], start=7)[0, 0], got[7])


def test_loss_is_one_eighth_text_and_seven_eighths_image_each_by_its_own_count(dalle, batch):
    padded, codes = dalle.padded(batch["text"]), dalle.look(batch["image"])
    words, picture = dalle.logits(padded, codes)
    text = sum(float(F.cross_entropy(words[b, i], padded[b, i + 1])) for b in range(3) for i in range(TEXT - 1)) / (3 * (TEXT - 1))
    image = sum(float(F.cross_entropy(picture[b, i], codes[b, i])) for b in range(3) for i in range(16)) / 48
    got = dalle.losses(batch)
    assert got["text"].item() == pytest.approx(text / 8, rel=1e-4) and got["image"].item() == pytest.approx(7 * image / 8, rel=1e-4)
    torch.testing.assert_close(dalle.nll(batch["image"], batch["text"]).mean().item(), image, rtol=1e-4, atol=1e-4)


def test_tokenizer_is_frozen_and_codes_are_its_argmax(dalle, batch):
    assert torch.equal(dalle.look(batch["image"]), dalle.codec.logits(batch["image"]).argmax(-1).flatten(1))
    before = {k: v.clone() for k, v in dalle.codec.state_dict().items()}
    steps = list(fit(dalle, toy().stages[0].but(steps=15, **{"optim.warmup": 0}), iter([batch] * 15)))
    assert steps[-1].total < steps[0].total and all(torch.equal(v, before[k]) for k, v in dalle.codec.state_dict().items())


# -- attention --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_patterns_are_causal_and_see_all_text(kind):
    seen = pattern(kind, 5, 6, kernel=5)
    assert not seen.triu(1).any() and seen.diagonal().all()
    assert torch.equal(seen[:5, :5], torch.ones(5, 5).tril().bool()) and seen[5:, :5].all()
    for i in range(36):
        (r, c) = divmod(i, 6)
        for j in range(i + 1):
            (s, d) = divmod(j, 6)
            want = {"full": True, "row": i - j <= 6, "column": c == d, "conv": r - s <= 2 and abs(c - d) <= 2}[kind]
            assert bool(seen[5 + i, 5 + j]) == want, (kind, i, j)


def test_layers_are_row_but_every_fourth_column_and_the_last_a_window():
    kinds = [c.kind for c in patterns(64, 256, 32)]
    assert kinds[:6] == ["row", "column", "row", "row", "row", "column"] and kinds[-1] == "conv" and kinds.count("column") == 16
    blocks = preset_of("dalle", "paper").config.body.block
    assert [b.attn.kind for b in blocks] == kinds and blocks[-1].attn.kernel == 11


def test_every_earlier_place_reaches_every_later_one_within_four_layers():
    reach = torch.eye(36).bool()
    for kind in ("row", "column", "row", "row"):
        reach = (pattern(kind, 0, 6).float() @ reach.float()) > 0
    assert torch.equal(reach, torch.ones(36, 36).tril().bool())
    place = torch.arange(36)
    same_row = (place[:, None] // 6 == place // 6) & (place[:, None] >= place)
    closed = torch.eye(36).bool()
    for _ in range(2):
        closed = ((same_row | pattern("column", 0, 6)).float() @ closed.float()) > 0
    assert not closed[12, 3], "rows that end at their border never reach columns to the left"


@pytest.mark.parametrize("layer", range(4))
def test_each_sparse_layer_is_causal(layer):
    torch.manual_seed(1)
    plan = recipe.patterns(4, TEXT, SIDE, kernel=3)[layer]
    attn = plan.but(width=16, heads=2).build().eval()
    x = torch.randn(1, TEXT + 16, 16)
    for i in (TEXT + 3, TEXT + 9):
        other = x.clone()
        other[:, i] += 1
        same = (attn(x) == attn(other)).all(-1)[0]
        assert same[:i].all() and not same[i]
    other = x.clone()
    other[:, 2] += 1
    assert not (attn(x) == attn(other)).all(-1)[0, TEXT:].any(), "all image tokens see all text"


def test_changing_a_token_changes_only_what_comes_behind_it(dalle, batch):
    padded, codes = dalle.padded(batch["text"]), dalle.look(batch["image"])
    _, before = dalle.logits(padded, codes)
    other = codes.clone()
    other[:, 5] = (other[:, 5] + 1) % 16
    _, after = dalle.logits(padded, other)
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before[:, 6:], after[:, 6:])
    spoken = padded.clone()
    spoken[:, 1] = 33
    changed = (dalle.logits(spoken, codes)[1] != before).any(-1)
    assert changed.all(), "any text token speaks to every image token"


# -- drawing ----------------------------------------------------------------------------------------------------------------------------

def test_cached_sampling_is_full_recomputation(dalle, batch):
    torch.manual_seed(7)
    got = dalle.draw(batch["text"])
    torch.manual_seed(7)
    padded, codes = dalle.padded(batch["text"]), torch.zeros(3, 16, dtype=torch.long)
    for i in range(16):
        codes[:, i] = torch.multinomial(dalle.logits(padded, codes)[1][:, i].softmax(-1), 1)[:, 0]
    assert torch.equal(got.flatten(1), codes)


class Judge(torch.nn.Module):
    """A scorer that likes what is bright."""

    def forward(self, image, text):
        assert image.min() >= 0 and image.max() <= 1
        return image.mean((1, 2, 3))


def test_the_candidate_that_the_scorer_likes_best_is_kept(dalle, batch):
    dalle.scorer = Judge()
    torch.manual_seed(3)
    drawn = dalle.codec.decode(dalle.draw(batch["text"].repeat_interleave(4, 0)))
    torch.manual_seed(3)
    best = dalle.generate_image(batch["text"], steps=1, candidates=torch.tensor(4))
    for b in range(3):
        four = drawn[4 * b:4 * b + 4]
        assert torch.equal(best[b], four[four.mean((1, 2, 3)).argmax()])


def test_ranked_takes_the_scorer_of_the_tiny_clip():
    plan, clip = preset_of("dalle", "ranked"), preset_of("clip")
    with torch.device("meta"):
        ours, theirs = plan.config.scorer.build(), clip.config.build()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert plan.feed.text.plain == clip.feed.text, "they read the same tokens"
    assert plan.starts[1].into == "scorer" and plan.config.candidates == 8


def test_scorer_reads_pictures_as_clip_does():
    torch.manual_seed(0)
    clip = preset_of("clip").config.build().eval()
    scorer = preset_of("dalle", "ranked").config.scorer.build().eval()
    scorer.load_state_dict(clip.state_dict())
    image, text = torch.rand(2, 3, 64, 64), torch.tensor([[1, 7, 2], [1, 9, 2]])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (recipe.CLIP_MEAN, recipe.CLIP_STD))
    want = (clip.encode_image((image - mean) / std) * clip.encode_text(text)).sum(-1)
    torch.testing.assert_close(scorer(image, text), want)


@pytest.mark.parametrize("name", ["tiny", "tiny_vq", "ranked", "paper"])
def test_one_in_ten_merges_of_a_caption_is_left_out(name):
    words = preset_of("dalle", name).feed.text
    assert isinstance(words, DropoutPlan) and words.dropout == 0.1 and words.plain.length == words.length


@pytest.mark.parametrize("call", [
    lambda s, b: s.generate_image(torch.full((1, 4), 64), steps=1), lambda s, b: s.generate_image(torch.ones(1, 99, dtype=torch.long), steps=1),
    lambda s, b: s.generate_image(b["text"], steps=1, guidance=torch.tensor(2.0)),
    lambda s, b: s.generate_image(b["text"], steps=1, candidates=torch.tensor(3)),
    lambda s, b: s.losses({**b, "image": torch.rand(3, 3, 32, 32)}), lambda s, b: toy(**{"config.candidates": 2}).config.build(),
    lambda s, b: pattern("rows", 2, 2)])
def test_what_cannot_be_drawn_is_refused(dalle, batch, call):
    with pytest.raises(UserError) as caught:
        call(dalle, batch)
    assert "\n" not in str(caught.value)


def test_words_become_a_picture_through_a_run_and_the_command_line(tmp_path, capsys):
    plan = toy(**{"starts": (), "stages.0.steps": 2, "stages.0.batch_size": 8, "data": "digits", "config.text_length": 24, "feed.text.length": 24,
                  "config.body": recipe.body(16, 2, 2, 24, SIDE, kernel=3), "config.text_vocab": 512})
    list(train_preset("dalle", plan, ("image", "text"), out=tmp_path / "run", workers=0, device="cpu"))
    words = ["generate", "a handwritten seven", "-m", str(tmp_path / "run"), "-n", "1", "--seed", "3"]
    assert main([*words, "--out", str(tmp_path / "one.png")]) == 0 and main([*words, "--out", str(tmp_path / "two.png")]) == 0
    one, two = ((tmp_path / f"{n}.png").read_bytes() for n in ("one", "two"))
    assert one == two and Image.open(tmp_path / "one.png").size == (16, 16)
    capsys.readouterr()
    assert main([*words, "--guidance", "3", "--out", str(tmp_path / "no.png")]) == 2 and not (tmp_path / "no.png").exists()
    assert "text alone" in capsys.readouterr().err
