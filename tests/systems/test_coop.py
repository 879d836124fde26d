"""CoOp's essence (Zhou et al. 2022): each test fails if its mechanism is replaced by a shortcut."""
import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch
from reference import shake

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.data.loader import Loader
from polysense.data.sources import ListSource
from polysense.data.tokenizer import make_tokenizer
from polysense.pipeline import Pipeline
from polysense.tasks.zero_shot import zero_shot_classifier
from polysense.towers.clip import body, vit_pair
from polysense.train.fit import fit

recipe = polysense.load("coop")
CLIP = polysense.load("clip")
PAIR = vit_pair(16, 8, body(24, 1, 2), body(24, 2, 2), 20, vocab=40, length=16, end=2)
STOP = 9
NAMES = torch.tensor([[1, 11, STOP, 2, 0, 0], [1, 12, 13, STOP, 2, 0], [1, 14, 15, 16, STOP, 2]])       # of one, two and three tokens


def system(**context):
    torch.manual_seed(0)
    built = recipe.prompting(PAIR, **{"context": 4, "classes": 3} | context).build()
    return shake(built) if built.text.context.numel() else built.eval()


def clip_of(ours):
    theirs = CLIP.CLIP.Config(**PAIR).build().eval()
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k not in ("text.context", "text.names")})
    return theirs


def batch(n: int = 6):
    g = torch.Generator().manual_seed(1)
    return {"image": torch.randn(n, 3, 16, 16, generator=g), "label": torch.arange(n) % 3, "names": NAMES.expand(n, -1, -1)}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unified", "specific"])
def test_a_context_of_words_is_the_prompt_written_by_hand(kind):
    ours = system(kind=kind, like=(20, 21, 22, 23))
    ours.after_start()
    ours.text.meet(NAMES)
    written = torch.cat([NAMES[:, :1], torch.tensor([[20, 21, 22, 23]] * 3), NAMES[:, 1:]], 1)
    theirs, image = clip_of(ours), batch()["image"]
    torch.testing.assert_close(ours.rows(NAMES), theirs.encode_text(written), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.encode_text(NAMES), theirs.encode_text(written), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.classify(image), theirs.scale * theirs.encode_image(image) @ theirs.encode_text(written).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("place", "want"), [("end", [1, 40, 41, 42, 43, 14, 15, 16, STOP, 2]), ("middle", [1, 40, 41, 14, 15, 16, 42, 43, STOP, 2]),
                                             ("front", [1, 14, 15, 16, 40, 41, 42, 43, STOP, 2])])
def test_the_name_stands_where_it_should_whatever_its_length(place, want):
    text = system(place=place).text
    got = text.prompted(NAMES)
    assert got[2].tolist() == want
    at = {"end": 5, "middle": 3, "front": 1}[place]
    for row, (many, ids) in zip(got.tolist(), ((1, [11]), (2, [12, 13])), strict=False):
        assert row[at:at + many] == ids and row[4 + many + 1:4 + many + 3] == [STOP, 2], "the full stop stands last, whatever the length of the name"
        assert [i for i in row if i >= 40] == [40, 41, 42, 43], "the vectors keep their order"
    assert text.last(text.prompted(NAMES)).tolist() == (text.last(NAMES) + 4).tolist(), "the end is found from ids"


@torch.no_grad()
def test_without_vectors_all_places_are_one_and_clips_own():
    rows = [system(place=place, context=0).rows(NAMES) for place in ("end", "middle", "front")]
    torch.testing.assert_close(rows[0], rows[1])
    torch.testing.assert_close(rows[0], rows[2])
    ours = system(context=0)
    torch.testing.assert_close(ours.rows(NAMES), clip_of(ours).encode_text(NAMES))


def test_positions_are_added_after_the_vectors_are_in():
    ours, seen = system(), []
    ours.text.body.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    ours.rows(NAMES)
    words = torch.cat([ours.text.embed(NAMES[:, :1]), ours.text.context.expand(3, -1, -1), ours.text.embed(NAMES[:, 1:])], 1)
    torch.testing.assert_close(seen[0], words + ours.text.position[:, :10])


@pytest.mark.parametrize("kind", ["unified", "specific"])
def test_only_the_context_trains_and_clip_stays_bit_for_bit(kind):
    ours, stage = system(kind=kind), preset_of("coop").stages[0].but(**{"steps": 3, "batch_size": 6, "optim.warmup": 0})
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    list(fit(ours, stage, [batch()] * 3))
    moved = {k for k, v in ours.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"text.context", "text.names"}
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == ["text.context"] and ours.text.context.grad.abs().min() > 0
    assert not ours.train().vision.training and ours.text.names[:, :6].tolist() == NAMES.tolist(), "what the classes are called is kept"


def test_a_context_of_one_class_changes_its_column_alone_and_a_unified_one_all():
    for kind in ("specific", "unified"):
        ours, image = system(kind=kind), batch()["image"]
        ours.text.meet(NAMES)
        with torch.no_grad():
            before = ours.classify(image)
            (ours.text.context[1] if kind == "specific" else ours.text.context).add_(torch.randn(4, 24))
            changed = (ours.classify(image) - before).abs().amax(0) > 1e-4
        assert changed.tolist() == ([False, True, False] if kind == "specific" else [True] * 3)
    assert system(kind="specific").text.context.shape == (3, 4, 24) and system().text.context.shape == (4, 24)


def test_the_loss_is_cross_entropy_over_scaled_cosines_to_all_classes_and_takes_cached_features():
    ours, given = system(), batch()
    logits = ours.scale * ours.encode_image(given["image"]) @ ours.rows(NAMES).T
    torch.testing.assert_close(ours.losses(given)["label"], F.cross_entropy(logits, given["label"]))
    with torch.no_grad():
        features = ours.vision.pooled(given["image"])
    cached = {"features": features, "label": given["label"], "names": given["names"]}
    torch.testing.assert_close(ours.losses(cached)["label"], ours.losses(given)["label"])


def test_nearest_words_are_those_the_context_began_as():
    ours = system(like=(20, 21))
    ours.after_start()
    assert ours.text.nearest().tolist() == [20, 21, 20, 21]
    assert system(kind="specific").text.nearest().shape == (3, 4)


def test_a_unified_context_takes_any_name_a_specific_one_its_own():
    other = torch.tensor([[1, 30, STOP, 2]])
    assert system().encode_text(other).shape == (1, 20)
    ours = system(kind="specific")
    with pytest.raises(UserError, match=r"none of the classes.*text\.meet"):
        ours.encode_text(other)
    ours.text.meet(NAMES)
    torch.testing.assert_close(ours.encode_text(NAMES[[2, 0]]), ours.rows(NAMES)[[2, 0]])
    with pytest.raises(UserError, match="none of the classes"):
        ours.encode_text(other)


def test_bad_input_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"the data have 3 classes.*text.classes=3"):
        system(classes=5).losses(batch())
    with pytest.raises(UserError, match=r"without the names.*labels"):
        system().classify(batch()["image"])
    with pytest.raises(UserError, match=r"12 tokens.*|at most 12"):
        system().encode_text(torch.ones(1, 13, dtype=torch.int64))
    with pytest.raises(UserError, match="place='back'"):
        system(place="back")
    with pytest.raises(UserError, match="like="):
        system(like=(99,))
    with pytest.raises(UserError, match="two towers of CLIP"):
        recipe.onto(preset_of("coop"), preset_of("lit"), preset_of("coop").starts[0])


WORDS = ["a red cup.", "a blue hat.", "a green tree in a park.", "a dog"]


@pytest.fixture(scope="module")
def photos():
    images = torch.randint(0, 255, (6, 20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    return ListSource("three kinds", [{"id": i, "image": images[i], "label": i % 3} for i in range(6)], ("image", "label"),
                      classes=("red_cup", "blue hat", "green tree"))


def small():
    return preset_of("coop").but(config=recipe.prompting(vit_pair(16, 8, body(24, 1, 2), body(24, 1, 2), 20, vocab=300, length=30, end=2), context=4,
                                                         classes=3)).but(**{"feed.image.size": 16, "feed.train_image.size": 16,
                                                                            "feed.text.vocab": 300, "feed.text.length": 30})


def test_the_names_of_all_classes_come_with_every_batch_and_a_pipeline_puts_them_likewise(photos):
    preset = small()
    tokenizer = make_tokenizer(preset.feed.text, WORDS)
    got = next(iter(Loader(photos, preset.feed, tokenizer, batch_size=4, needs=("image", "label", "names"))))
    assert [tokenizer.decode(row) for row in got["names"][3]] == ["red cup .", "blue hat .", "green tree ."]
    assert got["names"].shape[:2] == (4, 3) and "text" not in got
    torch.manual_seed(0)
    subject = Pipeline(preset.config.build(), preset, tokenizer, id="coop")
    with torch.no_grad():
        want = subject.system.rows(tokenizer(["red cup.", "a dog.", "hat."]).to(subject.device)).cpu()
    torch.testing.assert_close(zero_shot_classifier(subject, ["red cup", "a dog", "hat"], ("a photo of a {}.",)), want, rtol=1e-2, atol=1e-2)
    subject.system.text.meet(got["names"][0].to(subject.device))
    found = subject.classify([photos.load(0, "image")])[0].labels
    assert sorted(name for name, _ in found) == ["blue hat", "green tree", "red cup"], "it knows its classes by name"
    labelled = subject.label([photos.load(0, "image")], ["red cup", "blue hat", "green tree"])[0].labels
    assert [n for n, _ in labelled] == [n for n, _ in found]


def test_data_without_names_of_classes_are_refused(photos):
    bare = ListSource("no names", photos.samples, ("image", "label"))
    with pytest.raises(UserError, match="labels without names"):
        Loader(bare, small().feed, make_tokenizer(small().feed.text, WORDS), batch_size=2, needs=("image", "label", "names"))


def test_onto_another_clip_keeps_its_towers_and_its_way_of_reading():
    base = preset_of("clip", "tiny_vit")
    got = recipe.onto(preset_of("coop").but(**{"config.text.context": 7}), base, preset_of("coop").starts[0])
    assert got.config.vision == base.config.vision and got.config.text.context == 7 and got.config.text.body == base.config.text.body
    assert got.feed.image == base.feed.image and got.feed.text.plain == base.feed.text
    system = got.config.build()
    system.choose_trainable(got.stages[0].trainable)
    assert system.losses(fake_batch(got, ("image", "label", "names")))["label"].isfinite()
