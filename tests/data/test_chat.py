"""Conversations: the template, the mask over replies, pictures' places, length, and how batches of them are made."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from polysense.base.errors import UserError
from polysense.base.plan import ChatPlan, EpisodePlan, Feed, ImagePlan, PromptPlan, TextPlan, ViewPlan
from polysense.data import source
from polysense.data.chat import Chat, box_text, episode_ids, texts_of
from polysense.data.images import decode, fit, window
from polysense.data.loader import Loader
from polysense.data.maker import grouped
from polysense.data.tokenizer import load_tokenizer, make_tokenizer

IMAGE = 400
SEEN = source("scenes:qa?n=60&size=32")


def plan(**more):
    return ChatPlan(vocab=300, length=64, image=IMAGE, **more)


def chat(**more) -> Chat:
    made = plan(**more)
    return Chat(made, make_tokenizer(made, texts_of(SEEN, made)))


def read(c: Chat, ids) -> str:
    return " ".join("<image>" if i == IMAGE else "<end>" if i == 2 else "<s>" if i == 1 else c.tokenizer.decode([i]) for i in ids)


def test_only_replies_and_their_ends_are_learned():
    c = chat(system="a chat")
    ids, learned = c.row([("what colour is the circle?", "red"), ("is it large?", "no")])
    assert "<s>" in read(c, ids[:1]) and read(c, ids).count("<image>") == 1
    replies = [i for i, m in zip(ids, learned, strict=True) if m]
    assert replies == [*c.words("red"), 2, *c.words("no"), 2]
    assert ids.index(IMAGE) == 1 + len(c.words("a chat")) + len(c.words("user:")), "the picture stands before the first question"


def test_llavas_own_format_ends_every_part():
    c = chat(system="a chat", stop="all", user="human:")
    ids, learned = c.row([("is it red?", "yes"), ("and large?", "no")], "after")
    assert ids.count(2) == 5 and sum(learned) == len(c.words("yes")) + len(c.words("no")) + 2
    assert ids[ids.index(IMAGE) + 1] == 2, "the picture stands behind the first question"


def test_an_open_turn_ends_where_the_reply_begins():
    c = chat()
    ids, learned = c.row([("is it red?", "yes"), ("is it large?", None)])
    assert ids[-len(c.words("assistant:")):] == c.words("assistant:") and learned[-1] is False


def test_length_is_kept_by_leaving_out_later_turns_whole():
    c = chat()
    turns = [("is there a red circle?", "yes")] * 20
    ids, learned = c.row(turns)
    assert len(ids) <= 64 and ids[-1] == 2 and learned[-1]
    with pytest.raises(UserError, match="no room"):
        c.row([("is there a red circle? " * 30, "yes")])
    with pytest.raises(UserError, match="no room"):
        c.row([("is there a red circle? " * 30, None)])
    with pytest.raises(UserError, match="without turns"):
        c.row([])


def test_batches_are_padded_and_reproducible():
    feed = Feed(image=ImagePlan(size=32), text=plan(turns=3, place="either", briefly=("describe it.", "what is this?"), short="answer briefly."))
    tokenizer = make_tokenizer(feed.text, texts_of(SEEN, feed.text))
    needs = ("image", "chat", "chat_reply", "brief", "brief_reply")
    one, two = (next(iter(Loader(SEEN, feed, tokenizer, batch_size=8, seed=5, needs=needs))) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    halves = [next(iter(Loader(SEEN, feed, tokenizer, batch_size=8, seed=5, needs=needs, rank=r, world=2))) for r in range(2)]
    for key in ("chat", "brief"):
        ids, learned = one[key], one[f"{key}_reply"]
        assert ids.shape == learned.shape and ((ids == IMAGE).sum(1) == 1).all() and not learned[ids == 0].any() and learned.any(1).all()
        for half, rows in zip(halves, (slice(0, 4), slice(4, 8)), strict=True):
            wide = half[key].shape[1]
            assert torch.equal(half[key], ids[rows, :wide]), "ranks share one global batch"
    assert "answer briefly . <end>" not in (said := read(Chat(feed.text, tokenizer), one["chat"][0].tolist())) and "answer briefly ." in said


def test_what_is_missing_is_said():
    feed = Feed(image=ImagePlan(size=32), text=TextPlan(vocab=300, length=32))
    with pytest.raises(UserError, match="feed does not say"):
        Loader(SEEN, feed, make_tokenizer(feed.text, SEEN.captions()), batch_size=2, needs=("chat",))
    with pytest.raises(UserError, match="offers no chat"):
        Loader(source("digits"), Feed(text=plan()), None, batch_size=2, needs=("chat",))
    with pytest.raises(UserError, match="template"):
        Chat(TextPlan(vocab=300, length=32), make_tokenizer(TextPlan(vocab=300, length=32), SEEN.captions()))
    low = ChatPlan(vocab=300, length=32, image=7)
    with pytest.raises(UserError, match="image id"):
        Chat(low, make_tokenizer(low, texts_of(SEEN, low)))


def test_only_systems_that_write_learn_the_words_of_questions():
    assert not any("?" in t for t in texts_of(SEEN, TextPlan(vocab=300, length=32)))
    assert any("what colour" in t for t in texts_of(SEEN, PromptPlan(vocab=300, length=32)))


def test_padding_to_a_square_is_invertible_and_boxes_move_with_it():
    wide, ground = decode(source("scenes?n=1&size=64")[0]["image"]).resize((80, 40)), ImagePlan(size=160, fit="pad")
    made = fit(wide, ground)
    assert made.size == (160, 160)
    assert made.getpixel((5, 5)) == tuple(round(255 * m) for m in ground.mean), "the mean colour is around it"
    x0, y0, x1, y1 = window(wide.size, ground)
    assert (x0, x1) == (0.0, 1.0) and y0 == -0.5 and y1 == 1.5
    back = made.crop(tuple(round(160 * v) for v in ((0 - x0) / (x1 - x0), (0 - y0) / (y1 - y0), (1 - x0) / (x1 - x0), (1 - y0) / (y1 - y0))))
    difference = torch.tensor(list(back.resize((80, 40)).tobytes())).float() - torch.tensor(list(wide.tobytes())).float()
    assert difference.abs().mean() < 4, "cutting the frame out again gives the picture"
    assert box_text((0.0, 0.0, 1.0, 1.0), window(wide.size, ground)) == "[0.00, 0.25, 1.00, 0.75]"
    assert box_text((0.25, 0.5, 0.5, 1.0), (0.0, 0.0, 1.0, 1.0)) == "[0.25, 0.50, 0.50, 1.00]"


def test_batches_are_of_one_kind_and_every_sample_appears():
    kinds = [0] * 12 + [1] * 8
    order = grouped(kinds, 4, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(20)), "where whole batches fit, every sample appears exactly once"
    assert all(len({kinds[i] for i in batch}) == 1 for batch in order.reshape(-1, 4))
    order = grouped([0] * 5 + [1] * 2, 4, np.random.default_rng(0))
    assert len(order) == 12 and set(order.tolist()) == set(range(7))


@pytest.fixture()
def instructions(tmp_path):
    """LLaVA's file format: twelve conversations about pictures, eight without."""
    rows = []
    for i in range(20):
        row = {"id": f"c{i}", "conversations": [
            {"from": "human", "value": "<image>\nwhat is it?" if i < 12 else "what is two and two?"}, {"from": "gpt", "value": "a red circle"},
            {"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]}
        if i < 12:
            Image.fromarray(SEEN[i]["image"]).save(tmp_path / f"{i}.png")
            row["image"] = f"{i}.png"
        rows.append(row)
    rows.append({"id": "broken", "conversations": [{"from": "gpt", "value": "hello"}]})
    (tmp_path / "talk.json").write_text(json.dumps(rows))
    return tmp_path / "talk.json"


def test_instruction_files_are_read_in_batches_of_one_kind(instructions):
    data = source(instructions, split="all")
    assert len(data) == 20 and data.notes[0][0] == "20" and len(data[0]["chat"]) == 2 and "<image>" not in data[0]["chat"][0][0]
    feed = Feed(image=ImagePlan(size=32), text=plan())
    loader = iter(Loader(data, feed, make_tokenizer(feed.text, texts_of(data, feed.text)), batch_size=4, needs=("image", "chat", "chat_reply")))
    seen, kinds = [], set()
    for _ in range(5):
        batch = next(loader)
        seen += batch["index"].tolist()
        places = (batch["chat"] == IMAGE).sum(1)
        assert (places == places[0]).all()
        kinds.add(int(places[0]))
    assert sorted(seen) == list(range(20)) and kinds == {0, 1}


def test_instruction_files_that_are_damaged_are_refused(tmp_path):
    for text in ('[{"conversations": 3}]', '[{"conversations": [', '[{"conversations": []}]'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError):
            source(tmp_path / "x.json")


def test_llamas_own_tokenizer_is_read_as_it_is(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.train_from_iterator(["USER: What is this? ASSISTANT: A Red circle"] * 3, trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"]))
    from tokenizers import decoders

    engine.decoder = decoders.Metaspace()
    engine.save(str(tmp_path / "tokenizer.json"))
    made = load_tokenizer(tmp_path, ChatPlan(kind="llama", vocab=200, length=32, image=200))
    ids = made("What is this?")[0]
    assert ids[0] == made.start == 1 and ids[-1] == made.end == 2 and made.pad == 0
    assert made.decode(ids) == "What is this?", "case is kept"
    (tmp_path / "tokenizer.json").write_text("{")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError):
            load_tokenizer(folder, ChatPlan(kind="llama", vocab=200, length=32, image=200))
    with pytest.raises(UserError, match="not trained"):
        make_tokenizer(ChatPlan(kind="llama", vocab=200, length=32, image=200), ["a"])


def test_episodes_interleave_pictures_and_captions():
    words = EpisodePlan(vocab=600, length=120, image=600, shots=3)
    feed = Feed(image=ImagePlan(size=32), text=words)
    tokenizer = make_tokenizer(words, texts_of(SEEN, words))
    make = lambda train, **more: next(iter(Loader(SEEN, feed, tokenizer, batch_size=6, seed=3, train=train, needs=("images", "episode"), **more)))
    one, two = make(True), make(True)
    assert set(one) == {"index", "images", "episode"} and all(torch.equal(one[k], two[k]) for k in one)
    assert one["images"].shape == (6, 3, 3, 32, 32) and ((one["episode"] == 600).sum(1) == 3).all() and ((one["episode"] == 2).sum(1) == 3).all()
    half = make(True, rank=1, world=2)
    assert torch.equal(half["images"], one["images"][3:])
    plain = make(False)
    for row, i in enumerate(plain["index"].tolist()):
        for shot, j in enumerate(((i - 1) % 60, (i - 2) % 60, i)):
            said = plain["episode"][row].tolist()
            ends = [k for k, t in enumerate(said) if t == 600]
            assert tokenizer.decode(said[ends[shot] + 1:]).startswith(SEEN.about(j)["captions"][0][:12])
    alone = next(iter(Loader(SEEN, feed, tokenizer, batch_size=6, train=False, needs=("image",))))["image"]
    assert torch.equal(plain["images"][:, 2], alone) and torch.equal(plain["images"][1:, 0], alone[:-1])


def test_an_open_episode_ends_at_its_last_picture():
    words = EpisodePlan(vocab=600, length=40, image=600)
    tokenizer = make_tokenizer(words, texts_of(SEEN, words))
    ids = episode_ids(words, tokenizer, [["a red circle", None], [None]])
    assert ids[0, -1] == 600 and ids[1, :2].tolist() == [1, 600] and (ids[1, 2:] == 0).all()
    with pytest.raises(UserError, match="leave train_image out"):
        feed = Feed(image=ImagePlan(size=32), train_image=ViewPlan(size=32), text=words)
        next(iter(Loader(SEEN, feed, tokenizer, batch_size=2, needs=("images", "episode"))))
