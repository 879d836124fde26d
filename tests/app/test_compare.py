"""Equal-budget comparisons: sharing, budgets, resumption, the table and its statistics."""
import json
import shutil

import numpy as np
import pytest
import torch

import polysense
from polysense.app import compare as module
from polysense.app.compare import Budget, Field, compare
from polysense.app.entrants import Tokenizers, entrant, lend, likewise, line_up, shared, varied, views
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.cli import main
from polysense.cli.compare import part, seconds
from polysense.data import source
from polysense.tasks.probes import untrained
from polysense.tasks.result import Units, holm, paired

SMALL = {"vision.image_size": 32, "vision.patch": 16, "vision.body.depth": 1, "text.body.depth": 1, "batch_size": 8, "feed.image.size": 32,
         "feed.train_image.size": 32}
PAIR = ("clip:tiny_vit", "slip")


@pytest.fixture(scope="module")
def words():
    return Tokenizers(source("digits"))


# -- who takes part with what ------------------------------------------------------------------------------------------------------------------

def test_how_long_texts_are_goes_with_the_tower_that_reads_them():
    """VirTex reads captions by a decoder of its own: with the length of the others it would meet captions that it cannot read."""
    longer = {"config.vision.patch": 16, "config.text.length": 40, "feed.text.length": 40}
    assert likewise(entrant("coca", {}).plan, longer).feed.text.length == 40
    virtex = likewise(entrant("virtex", {}).plan, longer)
    assert virtex.feed.text.length == 30 and virtex.digest() == entrant("virtex", {}).plan.digest()


def test_parts_that_have_to_agree_are_changed_together():
    """CAE's regressor is as wide as its encoder: either alone is refused."""
    wide = {f"config.{part}.body.{k}": v for part in ("encoder", "decoder") for k, v in (("width", 64), ("heads", 2))}
    cae = likewise(entrant("cae", {}).plan, wide).config
    assert cae.encoder.width == cae.decoder.body.width == 64
    apart = likewise(entrant("simclr", {}).plan, {**wide, "batch_size": 8})      # has neither, and takes what it has
    assert apart.stages[0].batch_size == 8 and apart.config == entrant("simclr", {}).plan.config


@pytest.mark.parametrize("id, kept", [("declip", None), ("mae_clip", "text")])
def test_own_ids_behind_the_words_queues_and_heads_of_the_other_tower_fit_what_is_lent(id, kept):
    """DeCLIP hides words behind an id of its own and keeps features in a queue; MAE-CLIP's texts are read by another kind of tower."""
    made = line_up((PAIR[0], id), "fashion_products", Budget(steps=2), overrides=SMALL)
    reference, other = made[0].plan.config, made[1].plan.config
    assert [n.partition(" (")[0] for n in made[1].notes] == ([] if kept is None else [f"its own {kept} tower"]) and not made[1].why
    assert other.vision == reference.vision
    if kept is None:
        assert other.text == reference.text.but(vocab=4097) and other.queue.width == reference.image_head.out


# -- statistics -----------------------------------------------------------------------------------------------------------------------------

def units(right: np.ndarray) -> Units:
    return Units(right[None].astype(float), np.ones((1, len(right))))


def test_a_paired_gap_is_narrower_than_the_intervals_it_compares_and_finds_what_they_hide():
    g = np.random.default_rng(0)
    hard = g.random(400) < 0.5
    better = hard & (g.random(400) < 0.9)                # right on nearly the same pictures, and never where the other is not
    one, two = units(hard), units(better)
    gap, alone, other = paired([one], [two]), paired([one]), paired([two])
    assert gap.value == pytest.approx(hard.mean() - better.mean()) and gap.low > 0 and gap.p < 0.01
    assert alone.low < other.high, "the intervals alone overlap"


def test_a_system_does_not_differ_from_itself_and_training_seeds_widen_the_interval():
    g = np.random.default_rng(1)
    seeds = [units(g.random(300) < p) for p in (0.4, 0.5, 0.6)]
    same = paired(seeds, seeds)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    wide, narrow = paired(seeds), paired([seeds[1]])
    assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)


def test_under_the_null_p_is_rarely_small():
    g = np.random.default_rng(2)
    small = sum(paired([units(g.random(200) < 0.5)], [units(g.random(200) < 0.5)], seed=i, draws=400).p < 0.05 for i in range(60))
    assert small <= 8


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == [] and holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_systems_examined_on_other_units_are_refused():
    with pytest.raises(ValueError, match="same units"):
        paired([units(np.ones(3))], [units(np.ones(4))])


# -- who takes part -------------------------------------------------------------------------------------------------------------------------

def test_towers_heads_feed_and_batch_are_the_references(words):
    first, slip = entrant("clip:tiny_vit", SMALL), entrant("slip", {})
    made = shared(slip, first, words)
    a, b = first.plan, made.plan
    assert not made.why and not made.notes
    for name in ("vision", "text", "image_head", "text_head"):
        assert getattr(b.config, name) == getattr(a.config, name)
    assert b.config.projector.widths[0] == a.config.vision.width != slip.plan.config.projector.widths[0]
    assert (b.feed.image, b.feed.train_image, b.feed.text) == (a.feed.image, a.feed.train_image, a.feed.text)
    assert {v.size for v in b.feed.views} == {32} and b.feed.views[0].jitter == slip.plan.feed.views[0].jitter
    assert b.stages[0].batch_size == 8 and b.stages[0].optim == slip.plan.stages[0].optim, "the recipe's optimiser stays"
    assert b.stages[0].objective == slip.plan.stages[0].objective


def test_a_tower_that_comes_with_weights_stays_and_is_noted():
    first, lit = entrant("clip:tiny_vit", SMALL), entrant("lit", {})
    plan, missing = lend(lit.plan, first.plan, True, True)
    assert plan.config.vision == lit.plan.config.vision and plan.config.text == first.plan.config.text
    assert "comes with weights" in missing["image"] and plan.config.text_head.out == lit.plan.config.vision.width
    assert plan.config.text_head.into == first.plan.config.text.width


def test_what_a_system_cannot_work_with_it_keeps_and_says_so(words):
    first = entrant("clip:tiny_vit", SMALL)
    resnet = entrant("supervised", {})
    made = shared(resnet, first, words)
    assert not made.why and made.plan.config.backbone == first.plan.config.vision, "any image tower fits a classifier"
    mae = shared(entrant("mae", {}), entrant("clip", {"batch_size": 8}), words)
    assert mae.notes and "own image tower" in mae.notes[0] and mae.plan.config == entrant("mae", {}).plan.config


def test_a_tower_without_the_parameters_that_an_optimiser_names_is_not_lent(words):
    """BEiT's table of relative positions learns at a rate of its own; MAE's tower has none, and training would stop at the first step."""
    mae, beit = line_up(("mae", "beit"), "cifar10", Budget(steps=2))
    assert beit.notes == ["its own image tower (lr_scale='*.relative.table' matches no parameter)"] and not beit.why
    assert beit.plan.config.encoder == entrant("beit", {}).plan.config.encoder != mae.plan.config.encoder


def test_augmentations_are_said_view_by_view():
    assert views(entrant("moco", {}).plan.feed) == ["crops of 0.4 to 1, flip 0.5, jitter 0.5 (brightness 0.3)"] * 2
    assert views(entrant("mae", {}).plan.feed) == ["crops of 0.2 to 1, flip 0.5"]
    assert views(entrant("mae", {}).plan.feed.but(train_image=None)) == ["as they are"]
    assert views(preset_of("dino", "paper").feed)[0] == ("crops of 0.25 to 1, flip 0.5, grey 0.2, blur 1, jitter 0.8 (brightness 0.4, contrast 0.4, "
                                                         "saturation 0.2, hue 0.1)")
    assert "RandAugment 2 of magnitude 9" in views(preset_of("deit", "paper").feed)[0]


def test_the_data_must_offer_what_a_system_needs():
    some = line_up(["vit", "supervised", "clip"], "cifar10", Budget(steps=2))
    assert [bool(e.why) for e in some] == [False, False, True] and "text" in some[2].why
    with pytest.raises(UserError, match="only 1 of 2 can take part"):
        line_up(["vit", "clip"], "cifar10", Budget(steps=2))


@pytest.mark.parametrize(("words", "vary", "wrong"), [
    (["clip"], (), "cannot be compared"), (["clip", "slip"], (("objective", ["info_nce", "sigmoid"]),), "one system"),
    (["clip"], (("objective", ["info_nce"]),), "one value"), (["clip"], (("objective", ["info_nce", "nothing"]),), "no objective"),
    (["clip"], (("optim.learning", [1, 2]),), "optim"), (["clip", "mm_react"], (), "trains nothing"), (["clip", "clop"], (), "clop")])
def test_bad_line_ups_are_refused(words, vary, wrong):
    with pytest.raises(UserError, match=wrong):
        line_up(words, "digits", Budget(steps=2), vary=vary)


def test_budgets():
    fixed, seen, timed = (line_up(PAIR, "digits", b, overrides=SMALL, share=False)[1].plan.stages[0]
                          for b in (Budget(steps=7), Budget(samples=40), Budget(seconds=3.0)))
    assert fixed.steps == 7 and seen.steps == 40 // seen.batch_size and timed.steps >= 10 ** 5
    for wrong in ({}, {"steps": 1, "seconds": 1.0}, {"samples": 0}, {"seconds": -1.0}):
        with pytest.raises(UserError):
            Budget(**wrong)


# -- variants -------------------------------------------------------------------------------------------------------------------------------

def test_an_objective_can_be_exchanged_by_loss_method_or_system():
    of = entrant("clip:tiny_vit", SMALL)
    a, b, c, d = varied(of, [("objective", ["info_nce", "sigmoid", "compare", "slip"])])
    assert [e.label for e in (a, b, c, d)] == ["objective=info_nce", "objective=sigmoid", "objective=compare", "objective=slip"] and d.id == "slip"
    torch.manual_seed(0)
    system = of.plan.config.build()
    g = torch.nn.functional.normalize(torch.randn(2, 6, 8), dim=-1)
    seen = {"image": g[0], "text": g[1]}
    own, named, sigmoid = (float(e.plan.stages[0].objective(system, seen).total().detach()) for e in (c, a, b))
    assert own == pytest.approx(named, abs=1e-6) and abs(sigmoid - own) > 1e-2
    logits = system.scale * g[0] @ g[1].T - np.log(5)
    by_hand = -torch.nn.functional.logsigmoid(logits * (2 * torch.eye(6) - 1)).sum() / 6
    assert sigmoid == pytest.approx(float(by_hand.detach()), abs=1e-5)
    from polysense.base.spec import from_dict

    assert from_dict(json.loads(json.dumps(b.plan.to_dict()))) == b.plan, "the run folder can say it"


def test_fields_vary_in_all_combinations():
    made = varied(entrant("clip:tiny_vit", SMALL), [("optim.lr", [0.1, 0.2]), ("text.body.depth", [1, 2])])
    assert [(e.plan.stages[0].optim.lr, e.plan.config.text.body.depth) for e in made] == [(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)]
    assert made[3].label == "optim.lr=0.2, text.body.depth=2"


def test_words_of_the_command_line():
    assert part("optim.betas=(0.9,0.98),(0.9,0.999)") == ("optim.betas", [(0.9, 0.98), (0.9, 0.999)])
    assert (seconds("90s"), seconds("2m"), seconds("7")) == (90, 120, 7)
    for wrong in ("fast", "3d"):
        with pytest.raises(UserError, match="not a time"):
            seconds(wrong)


# -- the whole way --------------------------------------------------------------------------------------------------------------------------

GO: dict = {"seeds": 2, "overrides": SMALL, "exams": ("zero_shot", "retrieval"), "points": 1, "workers": 0, "device": "cpu", "test_split": "test"}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    out = tmp_path_factory.mktemp("first")
    return out, compare(PAIR, "digits", Budget(steps=3), out=out, **GO)


def test_it_reproduces_its_own_table_from_the_same_seeds_even_when_cut_short(first, tmp_path, monkeypatch):
    out, told = first
    real, count = module.trained, []

    def cut(e, *words):
        count.append(e.label)
        if len(count) == 3:
            raise KeyboardInterrupt
        real(e, *words)

    monkeypatch.setattr(module, "trained", cut)
    with pytest.raises(KeyboardInterrupt):
        compare(PAIR, "digits", Budget(steps=3), out=tmp_path, **GO)
    assert count == [PAIR[0], PAIR[1], PAIR[0]], "seed by seed"
    again = compare(PAIR, "digits", Budget(steps=3), out=tmp_path, **GO)
    assert count[3:] == [PAIR[0], PAIR[1]], "the two of the first seed were there"
    assert again.table == told.table and again.curves == told.curves
    assert json.loads((out / "compare.json").read_text())["table"] == json.loads((tmp_path / "compare.json").read_text())["table"]


def test_the_table_holds_means_over_seeds_with_intervals_and_gaps(first):
    told = first[1]
    assert [e["system"] for e in told.table] == list(PAIR) and told.facts["seeds"] == [0, 1]
    for row in told.table:
        assert set(row["scores"]) == {"zero shot, digits", "retrieval, digits"}
        for score in row["scores"].values():
            assert len(score["seeds"]) == 2 and score["low"] <= score["value"] <= score["high"]
            assert score["value"] == pytest.approx(np.mean(score["seeds"]))
            assert ("gap" in score) == (row["system"] != PAIR[0])
    assert all(len(points) >= 1 and points[-1][0] == 3 for lines in told.curves.values() for points in lines.values())


def test_what_is_finished_is_not_trained_again(first, monkeypatch):
    out, told = first
    monkeypatch.setattr(module, "trained", lambda *words, **options: pytest.fail("trained again"))
    assert compare(PAIR, "digits", Budget(steps=3), out=out, **GO).table == told.table


def test_another_budget_in_the_same_folder_is_refused(first):
    with pytest.raises(UserError, match="another preset"):
        compare(PAIR, "digits", Budget(steps=2), out=first[0], **GO)


def test_a_probe_learns_from_at_most_so_many_pictures_of_the_training_split(first):
    import polysense

    field = module.Field("digits", "train", "test", ("linear_probe",), 40)
    assert [str(s) for s in field.slots] == ["linear probe, digits"] and len(field.trains["digits"]) == 40
    said = module.examined(polysense.open(first[0] / "runs" / "slip-s0", device="cpu"), field)["linear probe, digits"]
    assert said["metric"] == "accuracy" and said["n"] == len(field.tests["digits"]) == len(said["total"][0])
    assert said["value"] == pytest.approx(np.mean(said["total"]))


def test_all_see_the_same_samples_in_the_same_order(first, words):
    losses = [json.loads(line) for line in (first[0] / "runs" / "slip-s0" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    from polysense.data.loader import Loader

    plans = [e.plan for e in line_up(PAIR, "digits", Budget(steps=3), overrides=SMALL)]
    rows = [[next(it)["index"].tolist() for _ in range(2)] for p in plans
            for it in [iter(Loader(source("digits"), p.feed, words(p.feed), batch_size=p.stages[0].batch_size, seed=0, workers=0,
                                   needs=("image", "text")))]]
    assert rows[0] == rows[1]


def test_the_pages_say_what_was_found(first):
    out = first[0]
    text, page = (out / "compare.md").read_text(), (out / "compare.html").read_text()
    for word in (*PAIR, "retrieval, digits", "mean rank", "3 steps"):
        assert word in text and word in page
    assert "<svg" in page and "src=" not in page and "<link" not in page and "<script" not in page
    assert "samples a second" in text and "need not hold" in text


def test_the_command(first, capsys):
    out, told = first
    words = ["compare", *PAIR, *(f"{k}={v}" for k, v in SMALL.items()), "--data", "digits", "--steps", "3", "--seeds", "2",
             "--exams", "zero_shot,retrieval", "--points", "1", "--workers", "0", "--device", "cpu", "--test-split", "test", "--out", str(out)]
    assert main(words) == 0
    assert "slip against clip:tiny_vit" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0 and json.loads(capsys.readouterr().out)["table"] == told.table
    assert main(["compare", "clip", "slip", "--data", "digits"]) == 2 and "budget" in capsys.readouterr().err
    assert main(["compare", "--help"]) == 0 and "--vary objective=" in capsys.readouterr().out


@pytest.mark.parametrize("id", ["cappa", "nclip_xclip"])
def test_what_reads_a_shared_tower_is_made_to_its_width(words, id):
    reference = entrant("clip:tiny_vit", {"config.vision.body.depth": 1, "config.text.body.depth": 1})
    assert entrant(id, {}).plan.config.vision.width != reference.plan.config.vision.width
    out = shared(entrant(id, {}), reference, words)
    assert not out.why and not out.notes and out.plan.config.vision == reference.plan.config.vision


def test_stair_keeps_the_towers_that_give_every_token_and_the_note_is_short(words):
    out = shared(entrant("stair", {}), entrant("clip:tiny_vit", {}), words)
    assert not out.why and out.plan.config == entrant("stair", {}).plan.config
    assert len(out.notes) == 1 and "every" in out.notes[0] and len(out.notes[0]) < 300


def test_other_data_can_be_examined_on_without_training_again(first, tmp_path, monkeypatch):
    out, _ = first
    shutil.copytree(out, tmp_path / "again")
    monkeypatch.setattr(module, "FORM", -1)              # whatever is kept is examined again
    told = compare(PAIR, "digits", Budget(steps=3), out=tmp_path / "again", **GO | {"on": "scenes:single?n=24&size=32", "exams": ("zero_shot",)})
    assert told.facts["data"] == "digits" and told.facts["on"].startswith("scenes") and len(told.slots) == 1 and "scenes" in told.slots[0]
    assert {r["system"] for r in told.table if r["scores"]} == set(PAIR)
    assert "All were examined on scenes" in told.markdown() and "All were examined" not in first[1].markdown()


def test_one_that_stops_on_the_way_is_left_out_with_its_reason_and_the_others_go_on(tmp_path, monkeypatch):
    real = module.one_run

    def some(e, *rest):
        if e.id == "flip":
            raise module.Stopped("a caption of 31 tokens", "let the tokenizer cut it")
        return real(e, *rest)

    monkeypatch.setattr(module, "one_run", some)
    made = compare((*PAIR, "flip"), "digits", Budget(steps=2), out=tmp_path, **{**GO, "seeds": 1})
    assert made.facts["systems"] == list(PAIR) and "a caption of 31 tokens" in made.left_out["flip"]
    assert set(made.losses) == set(made.costs) == set(PAIR)
    with pytest.raises(UserError, match="nobody is left"):
        compare((PAIR[0], "flip"), "digits", Budget(steps=2), out=tmp_path, **{**GO, "seeds": 1})


def test_beside_them_stands_the_first_one_as_it_is_born(tmp_path, monkeypatch):
    """Untrained, its scores differ from those of what was trained, are those of the seed's own weights, and a second call works nothing out."""
    def made():
        return compare(("mae", "simmim"), "cifar10", Budget(steps=2), seeds=1, overrides={"batch_size": 4, "config.encoder.body.depth": 1},
                       exams=("knn_probe",), probe=40, points=1, untrained=True, workers=0, out=tmp_path)

    found = made()
    assert [r["system"] for r in found.table] == ["mae", "simmim", "mae, untrained"] and found.facts["systems"] == ["mae", "simmim"]
    assert found.costs["mae, untrained"]["steps"] == 0 and set(found.losses) == {"mae", "simmim"}
    slot = found.slots[0]
    born = untrained(polysense.open(tmp_path / "runs" / "mae-s0"), 0)
    assert found.table[2]["scores"][slot]["value"] == module.examined(born, Field("cifar10", "train", "val", ["knn_probe"], 40))[slot]["value"]
    assert "as it is born" in found.markdown() and "crops of 0.2 to 1" in found.markdown() and "mae, untrained" in found.html()
    monkeypatch.setattr(module, "examined", lambda *a: pytest.fail("what is known was worked out again"))
    assert made().table == found.table
