"""Every exam on systems whose right score is known: planted features, collapsed features, and a real network that must stay as it was."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polysense.base.errors import UserError
from polysense.data.sources import BadSample
from polysense.data.templates import IMAGENET, SEVEN
from polysense.tasks import EXAMS, exams_for, take
from polysense.tasks.encode import Features, encode_all_images, encode_all_texts
from polysense.tasks.few_shot import leave_one_out, ridge, ridge_scores, some_of_each
from polysense.tasks.knn_probe import votes
from polysense.tasks.linear_probe import choose, held_out, logistic
from polysense.tasks.retrieval import ranks
from polysense.tasks.zero_shot import zero_shot_classifier

WORDS = ("red", "green", "blue", "grey", "pink", "cyan", "gold")
SIDE = 4


class Colours(nn.Module):
    """Pictures are flat colours; the network has everything that could leak: batch norm, dropout, weights that want a gradient."""
    tuned = False                            # whether an exam may ask for gradients

    def __init__(self, width: int = 12):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.ReLU(), nn.Linear(width, width))
        self.seen = 0

    def encode_image(self, image):
        assert self.tuned or (not torch.is_grad_enabled() and not self.training)
        self.seen += len(image)
        return F.normalize(self.net(image.mean((2, 3))), dim=-1)

    def encode_video(self, video):
        return self.encode_image(video[:, 0])

    @property
    def tower(self):
        """One place a picture."""
        return SimpleNamespace(dense=lambda image: self.encode_image(image)[:, None, None])


class Aligned(nn.Module):
    """The first picture column names its class as one-hot; a text is the one-hot of the class word that it holds."""

    def __init__(self, width: int = len(WORDS)):
        super().__init__()
        self.width, self.blind = width, nn.Parameter(torch.zeros(()))

    def encode_image(self, image):
        return F.normalize(F.one_hot(image[:, 0, 0, 0].long(), self.width).float() + self.blind, dim=-1)

    def encode_video(self, video):
        return self.encode_image(video[:, 0])

    def encode_audio(self, audio):
        return F.normalize(F.one_hot(audio[:, 0].long(), self.width).float() + self.blind, dim=-1)

    def encode_text(self, text):
        return F.normalize(F.one_hot(text[:, 0], self.width).float() + self.blind, dim=-1)


def subject(system, id="toy"):
    def read_texts(texts):
        return torch.tensor([[next((i for i, w in enumerate(WORDS) if w in t.replace(".", "").split()), 0), len(t)] for t in texts])
    return SimpleNamespace(system=system, id=id, device=torch.device("cpu"), preset=None, tokenizer=None, read_texts=read_texts,
                           read_images=lambda items: torch.from_numpy(np.stack(items)).permute(0, 3, 1, 2).float(),
                           read_audios=lambda items, rate=None: torch.from_numpy(np.stack(items)),
                           read_video_views=lambda item, clips, crops: torch.from_numpy(item).permute(0, 3, 1, 2).float().expand(
                               clips * crops, -1, -1, -1, -1),
                           read_videos=lambda items: torch.from_numpy(np.stack(items)).permute(0, 1, 4, 2, 3).float())


class Pictures:
    """n flat pictures: channel 0 is the class, the others noise; bad ones raise."""

    def __init__(self, n=60, classes=WORDS, offers=("index", "image", "label", "text", "video", "audio"), bad=(), captions=1, seed=0, name="flat"):
        self.name, self.classes, self.offers, self.n, self.bad, self.captions, self.seed = name, tuple(classes), offers, n, bad, captions, seed

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i in self.bad:
            raise BadSample(f"s{i}", "torn")
        label = i % len(self.classes)
        colour = np.random.default_rng([self.seed, i]).integers(0, 4, 3)
        colour[0] = label
        said = [f"{'very ' * k}{WORDS[label]} number {i}" for k in range(self.captions)]
        image = np.full((SIDE, SIDE, 3), colour, np.uint8)
        heard = np.full(5, label, np.float32)
        return {"id": f"s{i}", "image": image, "video": image[None].repeat(2, 0), "audio": heard, "label": label, "captions": said}


def planted(n=140, classes=7, noise=0.05, seed=0, width=10, name="planted") -> Features:
    g = torch.Generator().manual_seed(seed)
    label = np.arange(n) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    x = F.normalize(F.normalize(centres, dim=-1)[label] + noise * torch.randn(n, width, generator=g), dim=-1)
    return Features(name, ("index", "image", "label"), WORDS[:classes], x, label, [[] for _ in label])


SAME = Pictures()
TRAINED = [e.name for e in EXAMS.values() if e.trains and "encode_image" in e.asks]
QUICK = {"attentive_probe": {"steps": 5}, "fine_tune": {"steps": 3, "batch_size": 8}, "probes": {"steps": 5}, "linear_probe": {"sweep": (1.0, 100.0)}}
POOLED = [e for e in TRAINED if e not in ("attentive_probe", "fine_tune")]      # exams that one vector a picture is enough for
TAKEN = [e.name for e in EXAMS.values() if all(c.startswith("encode_") for c in e.asks)]     # by the toys above; the others have toys of their own


@pytest.mark.parametrize("exam", TAKEN)
def test_frozen_means_frozen(exam: str):
    """Not a bit of weights or buffers moves, modes come back, the random stream is untouched, and no gradient appears."""
    system = Aligned() if "text" in str(EXAMS[exam].asks) else Colours()
    system.train()
    if isinstance(system, Colours):
        system.net[1].eval()
        system.tuned = exam == "fine_tune"
    before = {k: v.clone() for k, v in system.state_dict().items()}
    modes, stream = [m.training for m in system.modules()], torch.get_rng_state()
    take(exam, subject(system), Pictures(30), Pictures(50, seed=1) if EXAMS[exam].trains else None, **QUICK.get(exam, {}))
    assert all(torch.equal(v, before[k]) for k, v in system.state_dict().items())
    assert [m.training for m in system.modules()] == modes
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad is None for p in system.parameters())


@pytest.mark.parametrize("exam", TAKEN)
def test_results_are_deterministic_and_complete(exam: str):
    system = Aligned() if "text" in str(EXAMS[exam].asks) else Colours().eval()
    system.tuned = exam == "fine_tune"
    train = Pictures(50, seed=1) if EXAMS[exam].trains else None
    one, two = (take(exam, subject(system), Pictures(30), train, **QUICK.get(exam, {})) for _ in range(2))
    assert one.to_json() == two.to_json()
    read = json.loads(one.to_json())
    assert read["exam"] == exam and read["n"] == 30 and read["subject"] == "toy" and read["data"] == "flat" and 0 < read["chance"] < 1
    for name, m in one.metrics.items():
        assert m.low <= m.value <= m.high, name
        assert read["metrics"][name] == {"value": m.value, "low": m.low, "high": m.high, "chance": m.chance}
    assert len(one.rows()) == len(one.metrics) == one.table().row_count


@pytest.mark.parametrize("exam", POOLED)
def test_separable_features_give_everything(exam: str):
    result = take(exam, subject(Colours()), planted(seed=1), planted())
    assert result.value == 1.0 and result.metrics[next(iter(result.metrics))].low == 1.0


@pytest.mark.parametrize("exam", POOLED)
def test_features_without_information_give_chance(exam: str):
    g = torch.Generator().manual_seed(5)
    noise = [Features("noise", ("image", "label"), WORDS, F.normalize(torch.randn(700, 8, generator=g), dim=-1), np.arange(700) % 7,
                      [[] for _ in range(700)]) for _ in range(2)]
    result = take(exam, subject(Colours()), *noise)
    assert abs(result.value - 1 / 7) < 0.06 and result.chance == pytest.approx(1 / 7)


@pytest.mark.parametrize("exam", ["zero_shot", "retrieval"])
def test_a_system_that_sees_everything_alike_earns_nothing(exam: str):
    """Constant features tie everything; a tie must not count as found."""
    system = Aligned()
    with torch.no_grad():
        system.blind.fill_(1e9)
    assert take(exam, subject(system), Pictures(70)).value == 0.0


def test_zero_shot_reads_the_class_names():
    result = take("zero_shot", subject(Aligned()), Pictures(70))
    assert result.value == 1.0 and result.classes["red"] == (1.0, 10) and result.metrics["top5_accuracy"].chance == pytest.approx(5 / 7)
    shuffled = take("zero_shot", subject(Aligned()), Pictures(70), names=WORDS[::-1])
    assert shuffled.value == pytest.approx(1 / 7)                       # only the middle name is still right
    assert shuffled.notes["templates"] == 1 and shuffled.notes["first_template"] == "a photo of a {}."


def test_an_ensemble_of_one_is_no_ensemble_and_many_are_averaged_after_normalising():
    system = Aligned()
    system.encode_text = lambda text: F.normalize(torch.stack([text[:, 0] + 1.0, text[:, 1].float()], 1), dim=-1)
    who = subject(system)
    one = zero_shot_classifier(who, ["red", "blue"], ["a photo of a {}."])
    torch.testing.assert_close(one, encode_all_texts(who, ["a photo of a red.".replace("red", w) for w in ("red", "blue")]))
    torch.testing.assert_close(zero_shot_classifier(who, ["red", "blue"], ["a photo of a {}."] * 3), one)
    both = zero_shot_classifier(who, ["blue"], ["{}", "a much longer text of a {} thing"])
    rows = encode_all_texts(who, ["blue", "a much longer text of a blue thing"])
    torch.testing.assert_close(both[0], F.normalize(rows[0] + rows[1], dim=0))


def test_the_templates_of_clip():
    assert len(IMAGENET) == len(set(IMAGENET)) == 80 and all(t.count("{}") == 1 for t in IMAGENET)
    assert len(SEVEN) == 7 and set(SEVEN) < set(IMAGENET)
    assert take("zero_shot", subject(Aligned()), Pictures(21), templates="imagenet").notes["templates"] == 80


def slow_ranks(similar, owner):
    """By counting, one at a time. similar [n pictures, m captions]."""
    n, m = similar.shape
    to_text = []
    for i in range(n):
        best = max(similar[i, j] for j in range(m) if owner[j] == i)
        rivals = [similar[i, j] for j in range(m) if owner[j] != i]
        to_text.append(1 + sum(r > best for r in rivals) + sum(r == best for r in rivals) / 2)
    to_image = []
    for j in range(m):
        rivals = [similar[i, j] for i in range(n) if i != owner[j]]
        to_image.append(1 + sum(r > similar[owner[j], j] for r in rivals) + sum(r == similar[owner[j], j] for r in rivals) / 2)
    return to_text, to_image


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=9), seed=st.integers(0, 99), block=st.integers(1, 6))
def test_ranks_equal_a_slow_loop_with_ties(counts, seed, block):
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(len(counts)), counts)
    images, texts = (torch.from_numpy(rng.integers(-1, 2, (k, 2)).astype(np.float32)) for k in (len(counts), len(owner)))
    fast, slow = ranks(images, texts, owner, block), slow_ranks((images @ texts.T).numpy(), owner)
    for a, b in zip(fast, slow, strict=True):
        assert a.tolist() == b


def test_retrieval_counts_every_caption_and_draws_whole_pictures():
    result = take("retrieval", subject(Aligned(len(WORDS))), Pictures(7, captions=3))
    assert result.value == 1.0 and result.n == 7 and result.notes["captions"] == 21
    assert result.metrics["image_to_text_r1"].chance == pytest.approx(3 / 21)
    assert result.metrics["text_to_image_r5"].chance == pytest.approx(5 / 7)
    crowd = take("retrieval", subject(Aligned()), Pictures(21))                  # three alike pictures each: the middle of three
    assert crowd.metrics["text_to_image_r1"].value == 0 and crowd.metrics["text_to_image_r5"].value == 1
    assert crowd.metrics["text_to_image_median_rank"].value == 2


def test_logistic_regression_finds_the_optimum_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    x, y = torch.randn(120, 6), np.arange(120) % 4
    x[:, 0] += torch.from_numpy(y) * 0.7
    for c in (0.03, 1.0, 300.0):
        weight, bias = logistic(x, y, 4, c, tolerance=1e-9)
        theirs = LogisticRegression(C=c, tol=1e-10, max_iter=5000).fit(x.double().numpy(), y)
        np.testing.assert_allclose(weight, theirs.coef_, atol=2e-4 * max(1, np.abs(theirs.coef_).max()))
        np.testing.assert_allclose(bias, theirs.intercept_ - theirs.intercept_.mean(), atol=1e-3)


def test_strengths_at_chance_are_passed_and_those_behind_the_best_are_not_tried(monkeypatch):
    """Features that hardly differ: at strong penalties the commonest class is all that is said, and the draw makes one of them worse than another."""
    from polysense.tasks import linear_probe

    n, classes = 500, 25
    y, right = np.arange(n) % classes, dict(zip((10.0 ** e for e in range(-2, 9)), (0.04, 0.05, 0.02, 0.04, 0.1, 0.3, 0.4, 0.2, 0.18, 0.9, 0.9)))
    kept = held_out(y, 0.2, 0)

    def scripted(x, labels, classes, c, start=None, **options):
        share = right.get(c, 0.35)           # half a step from the best: a little less
        said = torch.from_numpy(np.where(np.cumsum(kept) <= share * kept.sum(), y, (y + 1) % classes))
        return F.one_hot(said, classes).double().T, torch.zeros(classes, dtype=torch.double)

    monkeypatch.setattr(linear_probe, "logistic", scripted)
    best, tried = choose(torch.eye(n), y, classes, tuple(right))
    assert best == 1e4 and max(tried) == 1e6, "two worse by far end the sweep, two worse by a draw do not"


def test_the_sweep_starts_warm_and_ends_at_the_same_optimum():
    x, y = planted(noise=0.6).labelled()
    cold = logistic(x, y, 7, 10.0)
    warm = logistic(x, y, 7, 10.0, logistic(x, y, 7, 0.1))
    torch.testing.assert_close(cold[0], warm[0], atol=1e-4, rtol=1e-4)


def test_the_strength_is_chosen_on_training_data_alone_and_test_data_are_scored_once():
    learn = planted(noise=0.5)
    first = take("linear_probe", subject(Colours()), planted(noise=0.5, seed=1), learn)
    second = take("linear_probe", subject(Colours()), planted(noise=0.5, seed=2), learn)
    assert first.notes["C"] == second.notes["C"] and first.notes["validation_accuracy"] == second.notes["validation_accuracy"]
    assert first.notes["C"] == choose(*learn.labelled(), 7)[0]


def test_the_validation_part_takes_its_share_of_every_class():
    y = np.repeat([0, 1, 2, 3], [20, 10, 2, 1])
    out = held_out(y, 0.2, 0)
    assert np.bincount(y[out], minlength=4).tolist() == [4, 2, 1, 0]
    assert not np.array_equal(out, held_out(y, 0.2, 1))


@pytest.mark.parametrize("n, d", [(30, 8), (8, 30)])
def test_ridge_equals_its_closed_form(n: int, d: int):
    x, y = torch.randn(n, d, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)
    expected = torch.linalg.inv(x.T @ x + 0.3 * torch.eye(d, dtype=torch.float64)) @ x.T @ y
    torch.testing.assert_close(ridge(x, y, 0.3), expected, atol=1e-4, rtol=1e-4)


def test_leave_one_out_equals_leaving_one_out():
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)

    def error(l2):
        total = 0.0
        for i in range(12):
            rest = torch.arange(12) != i
            total += float(((torch.from_numpy(ridge_scores(x[rest], y[rest], x[i:i + 1], l2)) - y[i]) ** 2).sum())
        return total

    strengths = (1e-4, 1e-2, 0.3, 1.0, 3.0, 10.0, 100.0)
    assert leave_one_out(x - x.mean(0), y - y.mean(0), strengths) == min(strengths, key=error)


def test_few_shot_draws_so_many_of_each_class():
    y = np.repeat([0, 1, 2], [9, 4, 2])
    rows = some_of_each(y, 3, np.random.default_rng(0))
    assert np.bincount(y[rows]).tolist() == [3, 3, 2] and len(set(rows)) == 8
    result = take("few_shot", subject(Colours()), planted(noise=0.4, seed=1), planted(noise=0.4), shots=(1, 10))
    assert list(result.metrics) == ["accuracy_10_shot", "accuracy_1_shot"] and result.value > result.metrics["accuracy_1_shot"].value


def test_votes_equal_a_slow_count():
    x, y = F.normalize(torch.randn(15, 3), dim=-1), np.arange(15) % 4
    ask = F.normalize(torch.randn(6, 3), dim=-1)
    fast = votes(ask, x, y, 4, 5, 0.07, block=4)
    for q, row in zip(ask, fast, strict=True):
        near = sorted(((float(q @ v), int(c)) for v, c in zip(x, y, strict=True)), reverse=True)[:5]
        slow = [sum(np.exp((s - near[0][0]) / 0.07) for s, c in near if c == k) for k in range(4)]
        np.testing.assert_allclose(row, slow, rtol=1e-4)


def test_more_neighbours_than_samples_are_all_of_them():
    assert take("knn_probe", subject(Colours()), planted(14, seed=1), planted(14), k=500).notes["k"] == 14


def test_features_are_computed_once_and_serve_many_exams():
    system = Colours().eval()
    who = subject(system)
    test, train = encode_all_images(who, Pictures(30)), encode_all_images(who, Pictures(50, seed=1))
    direct = take("knn_probe", who, Pictures(30), Pictures(50, seed=1))
    system.seen = 0
    assert take("knn_probe", who, test, train).to_json() == direct.to_json()
    assert [take(e, who, test, train).n for e in POOLED] == [30] * len(POOLED) and system.seen == 0
    with pytest.raises(UserError, match=r"reads patches.*give the data"):
        take("attentive_probe", who, test, train)


def test_damaged_pictures_are_left_out_and_listed():
    said = []
    result = take("zero_shot", subject(Aligned()), Pictures(30, bad=(3, 8)), batch_size=7, progress=lambda done, total: said.append((done, total)))
    assert result.n == 28 and result.notes["skipped"] == [["s3", "torn"], ["s8", "torn"]]
    assert said == [(7, 30), (14, 30), (21, 30), (28, 30), (30, 30)]
    with pytest.raises(UserError, match="torn"):
        take("zero_shot", subject(Aligned()), Pictures(2, bad=(0, 1)))


def test_samples_without_label_are_not_examined():
    f = planted(70, seed=1)
    f.labels[:7] = -1
    assert take("knn_probe", subject(Colours()), f, planted()).n == 63


@pytest.mark.parametrize("exam, system, test, train, options, says", [
    ("zero_shot", Colours, Pictures(), None, {}, "encode_text.*linear_probe, knn_probe, few_shot"),
    ("zero_shot", nn.Identity, Pictures(), None, {}, "none of the exams"),
    ("zero_shot", Aligned, Pictures(offers=("image", "text")), None, {}, "needs label"),
    ("retrieval", Aligned, Pictures(offers=("image", "label")), None, {}, "needs text"),
    ("linear_probe", Aligned, Pictures(), None, {}, "training data"),
    ("linear_probe", Aligned, Pictures(), Pictures(offers=("image",)), {}, "training data 'flat' do not offer"),
    ("knn_probe", Aligned, Pictures(), Pictures(classes=WORDS[::-1]), {}, "different classes"),
    ("zero_shot", Aligned, Pictures(), None, {"template": "x"}, "no option 'template'.*templates"),
    ("zero_shot", Aligned, Pictures(), None, {"templates": "photo"}, "no templates 'photo'"),
    ("zero_shot", Aligned, Pictures(), None, {"templates": ["photo"]}, "every template"),
    ("zero_shot", Aligned, Pictures(), None, {"names": ["red"]}, "1 names were given"),
    ("linear_prob", Aligned, Pictures(), None, {}, "no exam 'linear_prob'.*linear_probe"),
    ("few_shot", Aligned, Pictures(), Pictures(), {"shots": 0}, "at least 1"),
    ("knn_probe", Aligned, SAME, SAME, {}, "what it learned from"),
])
def test_what_cannot_be_examined_is_refused_with_advice(exam, system, test, train, options, says):
    with pytest.raises(UserError, match=says):
        take(exam, subject(system()), test, train, **options)


def test_features_that_are_not_finite_are_refused():
    system = Colours()
    with torch.no_grad():
        system.net[0].weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        take("knn_probe", subject(system), Pictures(), Pictures())


def test_exams_are_listed_without_torch():
    import subprocess
    import sys

    code = "import sys; from polysense.tasks import EXAMS; assert len(EXAMS) > 5; print(sorted({'torch', 'numpy', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    assert exams_for(Colours()) == ("linear_probe", "knn_probe", "few_shot", "attentive_probe", "fine_tune", "probes", "video_linear_probe",
                                    "video_knn_probe")


def test_videos_of_several_vectors_are_as_near_as_their_nearest():
    """Against the plain rule, one caption and one video at a time; videos of fewer vectors are filled up without effect."""
    g = torch.Generator().manual_seed(0)
    parts = [F.normalize(torch.randn(k, 6, generator=g), dim=-1) for k in (1, 3, 2, 3)]
    texts, owner = F.normalize(torch.randn(9, 6, generator=g), dim=-1), np.array([0, 0, 1, 2, 2, 2, 3, 3, 3])
    similar = torch.stack([(texts @ p.T).amax(1) for p in parts], 1)
    filled = torch.stack([torch.cat([p, p[-1:].expand(3 - len(p), -1)]) for p in parts])
    to_text, to_video = ranks(filled, texts, owner)
    assert to_video.tolist() == [1 + int((row > row[o]).sum()) for row, o in zip(similar, owner)]
    mine = [similar[owner == v, v].max() for v in range(4)]
    assert to_text.tolist() == [1 + int((similar[owner != v, v] > mine[v]).sum()) for v in range(4)]


def test_video_retrieval_is_perfect_where_the_features_are_and_leaves_out_torn_videos():
    result = take("video_retrieval", subject(Aligned()), Pictures(len(WORDS), bad=(2,), captions=3))
    assert result.n == 6 and result.metrics["text_to_video_r1"].value == 1 and result.metrics["video_to_text_median_rank"].value == 1
    assert result.notes["skipped"] == [["s2", "torn"]] and result.notes["captions"] == 18


def test_sounds_are_classified_by_the_names_of_their_classes_at_the_rate_of_their_source():
    rates = []
    who = subject(Aligned())
    plain = who.read_audios
    who.read_audios = lambda items, rate=None: rates.append(rate) or plain(items)
    test = Pictures(21, bad=(3,))
    test.rate = 8000
    result = take("sound_zero_shot", who, test)
    assert result.metrics["accuracy"].value == 1 and result.n == 20 and set(rates) == {8000} and result.notes["skipped"] == [["s3", "torn"]]
