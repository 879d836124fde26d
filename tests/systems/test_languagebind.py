"""LanguageBind's essence (Zhu et al. 2024): each test fails if its mechanism is replaced by a shortcut."""
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.cli import main
from polysense.data.text_views import in_views
from polysense.mechanisms.lora import merge
from polysense.nn.mel import MelChunks, MelSpectrogram
from polysense.nn.planes import ThreeChannels
from polysense.train.fit import fit
from polysense.train.starts import carry

recipe = polysense.load("languagebind")
BODY = recipe.body(16, 2, 2)
MEL = MelChunks.Config(bins=16, frames=24)
PLANE = ThreeChannels.Config()


def small(**but):
    own = {"audio": recipe.sense(recipe.plane(BODY, (16, 24), 8, MEL), 12, rank=2, ratio=0.5),
           "depth": recipe.sense(recipe.plane(BODY, (32, 32), 8, PLANE), 12, rank=2, ratio=0.5),
           "thermal": recipe.sense(recipe.plane(BODY, (32, 32), 8, PLANE), 12, rank=2, ratio=0.5),
           "video": recipe.sense(recipe.image_tower(32, 8, recipe.over_time(BODY, 4)), 12, rank=2, ratio=0.5, on="*.attn_time.q|k|v|out")}
    here = recipe.clip(32, 8, BODY, BODY, 12, vocab=60, length=8, end=2)
    return recipe.LanguageBind.Config(**{**here, **own, **but})


@pytest.fixture()
def model():
    torch.manual_seed(0)
    return stirred(small().build().eval())


def stirred(model):
    """Updates begin as nothing: give them something to say."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                p.normal_(std=0.2)
    return model


def batch(n: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"text": torch.randint(3, 60, (n, 6), generator=g), "audio": 0.1 * torch.randn(n, 8000, generator=g),
            "depth": torch.rand(n, 1, 32, 32, generator=g), "thermal": torch.rand(n, 1, 32, 32, generator=g),
            "video": torch.randn(n, 4, 3, 32, 32, generator=g)}


def stage_of(name: str, steps: int):
    return recipe.trains(name, steps, 4, 1e-2, 0.5, weight_decay=0.05).but(precision="fp32")


def trained(model, name: str, seed: int = 1):
    torch.manual_seed(seed)
    list(fit(model, stage_of(name, 3), [{k: v for k, v in batch(seed=s).items() if k in (name, "text")} for s in range(3)]))


def test_the_text_tower_and_every_other_tower_stay_bit_for_bit(model):
    for name in recipe.LEARNED:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        trained(model, name)
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert moved and all(k.startswith(f"{name}.") for k in moved), moved
        inside = {k for k in moved if ".blocks." in k}
        assert inside and all(".lora." in k or ".position_time" in k or ".norm_time." in k for k in inside), "CLIP's blocks stay"
        assert f"{name}.log_scale" in moved


def test_the_order_of_binding_makes_no_difference():
    results = []
    for order in (("audio", "depth"), ("depth", "audio")):
        torch.manual_seed(0)
        model = small().build()
        for name in order:
            trained(model, name)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_each_loss_is_symmetric_infonce_at_its_own_temperature(model):
    with torch.no_grad():
        model.depth.log_scale.fill_(1.0)
    b = batch()
    losses = model.bind(model.embed({k: b[k] for k in ("text", "depth", "audio")}))
    assert set(losses) == {"audio", "depth"} and model.audio.scale.item() == pytest.approx(1 / 0.07, rel=1e-4)
    seen = {"depth": model.encode_depth(b["depth"]), "text": model.encode_text(b["text"])}
    logits = torch.e * seen["depth"] @ seen["text"].T
    want = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
    torch.testing.assert_close(model.bind(seen)["depth"], want)


def test_video_masks_are_the_same_in_every_frame_and_differ_between_samples(model, monkeypatch):
    kept: list[torch.Tensor] = []
    tower = model.video.tower
    forward = type(tower).forward

    def watched(self, image, keep=None, short=False, fill=None):
        kept.append(keep)
        return forward(self, image, keep, short, fill)

    monkeypatch.setattr(type(tower), "forward", watched)
    model.train()
    model.embed({k: v for k, v in batch(8).items() if k in ("text", "video")})
    frames = kept[0].unflatten(0, (8, 4))
    assert frames.shape == (8, 4, 8), "half of sixteen places"
    assert torch.equal(frames, frames[:, :1].expand_as(frames)) and len({tuple(sorted(r.tolist())) for r in frames[:, 0]}) > 4
    model.eval().encode_video(batch()["video"])
    assert kept[-1] is None, "everything is read outside training"


@pytest.mark.parametrize("name, tokens", [("audio", 6), ("depth", 16), ("thermal", 16)])
def test_half_of_the_patches_in_training_each_at_its_own_place(model, name, tokens):
    lengths: list[int] = []
    own = getattr(model, name)
    hook = own.tower.body.blocks[0].register_forward_hook(lambda m, args, out: lengths.append(args[0].shape[1]))
    model.embed({k: v for k, v in batch().items() if k in ("text", name)})
    getattr(model, f"encode_{name}")(batch()[name])
    hook.remove()
    assert lengths == [1 + tokens // 2, 1 + tokens]
    with torch.no_grad():
        keep = torch.arange(tokens).expand(4, -1)
        torch.testing.assert_close(own.pooled(batch()[name], keep), own.pooled(batch()[name], None), atol=1e-5, rtol=1e-4)
        flipped = own.pooled(batch()[name], keep.flip(1))
        torch.testing.assert_close(flipped, own.pooled(batch()[name], None), atol=1e-5, rtol=1e-4, msg="positions go with the places")


def test_updates_stand_on_attention_linears_alone_and_for_video_on_the_look_along_time(model):
    where = {name: {k.split(".blocks.0.")[1].split(".lora")[0] for k in model.state_dict() if k.startswith(f"{name}.") and ".blocks.0." in k
                    and ".lora." in k} for name in recipe.LEARNED}
    assert where == {"audio": (plain := {"attn.q", "attn.k", "attn.v", "attn.out"}), "depth": plain, "thermal": plain,
                     "video": {f"attn_time.{n}" for n in ("q", "k", "v", "out")}}
    assert not any(".lora." in k for k in model.state_dict() if k.startswith(("image.", "text.")))
    b = batch()
    before = model.encode_depth(b["depth"])
    merge(model)
    torch.testing.assert_close(model.encode_depth(b["depth"]), before, atol=1e-5, rtol=1e-4)
    for name, preset in (("depth", "paper"), ("thermal", "paper_thermal"), ("audio", "paper_audio"), ("video", "paper_video")):
        own = getattr(preset_of("languagebind", preset).config, name)
        assert (own.adapter.rank, own.adapter.alpha, own.sampler.ratio) == {
            "depth": (2, 16.0, 0.5), "thermal": (2, 16.0, 0.5), "audio": (16, 16.0, 0.1), "video": (16, 16.0, 0.3)}[name]


@torch.no_grad()
def test_time_is_known_through_positions_and_attention_alone(model):
    video, order = batch()["video"], [2, 0, 3, 1]
    assert (model.encode_video(video) - model.encode_video(video[:, order])).abs().max() > 1e-4
    for block in model.video.tower.body.blocks:
        block.position_time.zero_()
    torch.testing.assert_close(model.encode_video(video), model.encode_video(video[:, order]), atol=1e-5, rtol=1e-4)
    for block in model.video.tower.body.blocks:
        block.attn_time.out.weight.zero_()
        block.attn_time.out.bias.zero_()
        block.attn_time.out.lora["default"].B.zero_()
    each = torch.stack([model.video.head(model.video.tower.pooled(f)) for f in video.flatten(0, 1).unflatten(0, (-1, 4)).unbind(0)])
    torch.testing.assert_close(model.encode_video(video), F.normalize(each.mean(1), dim=-1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_start_lends_every_tower_clips_weights():
    torch.manual_seed(0)
    clip, preset = preset_of("clip", "tiny_vit").config.build().eval(), recipe.tiny_video()
    for plan in (preset, recipe.tiny_depth(), recipe.tiny()):
        ours = plan.config.build().eval()
        for start in plan.starts:
            carry(start, SimpleNamespace(system=clip), ours)
        image, text = torch.randn(2, 3, 64, 64), torch.tensor([[1, 9, 2], [1, 7, 2]])
        assert torch.equal(ours.encode_text(text), clip.encode_text(text)) and torch.equal(ours.encode_image(image), clip.encode_image(image))
        if ours.video is not None:
            block = ours.video.tower.body.blocks[1]
            assert torch.equal(block.attn_time.q.weight, block.attn.q.weight) and torch.equal(block.norm_time.weight, block.norm1.weight)
            assert block.attn_time.q.weight is not block.attn.q.weight and float(block.position_time.std()) > 0.01
        if ours.depth is not None:           # a map is a picture of three equal channels, so it is seen as CLIP sees it
            seen = ours.depth.tower.front(image[:, :1])
            torch.testing.assert_close(ours.encode_depth(image[:, :1]), clip.encode_image(seen), atol=1e-5, rtol=1e-4)
        if ours.audio is not None:
            assert ours.audio.tower.position.shape == (1, 1 + 8 * 16, 192) and torch.equal(ours.audio.tower.cls, clip.vision.cls)
    assert not any(s.into.endswith("log_scale") and s.into != "image.log_scale" for s in recipe.tiny().starts), "new temperatures begin at 0.07"


def test_depth_is_cut_divided_and_repeated():
    planes = ThreeChannels.Config(far=10.0).build()
    metres = torch.tensor([-1.0, 0.0, 2.5, 10.0, 80.0]).view(1, 1, 1, 5)
    assert planes.share(metres).flatten().tolist() == [0, 0, 0.25, 1, 1]
    seen = planes(metres)
    back = seen * planes.std + planes.mean
    torch.testing.assert_close(back, planes.share(metres).expand(1, 3, 1, 5))
    with pytest.raises(UserError, match="3 channels"):
        planes(torch.zeros(1, 3, 4, 4))
    assert preset_of("languagebind", "paper").config.depth.tower.front.far == 10.0


def test_a_sound_is_its_front_its_middle_and_its_back():
    torch.manual_seed(0)
    chunks, plain = MelChunks.Config(bins=16, frames=20).build().eval(), MelSpectrogram.Config(bins=16, frames=1000).build()
    audio = 0.1 * torch.randn(2, 160 * 80)
    whole = plain.energies(audio)
    spare = whole.shape[1] - 20
    starts = chunks.starts(spare, 2)
    want = torch.stack([whole[:, s:s + 20] for s in starts[0].tolist()], 1)
    torch.testing.assert_close(chunks(audio), ((want - chunks.mean) / chunks.std).transpose(2, 3))
    assert chunks(audio).shape == (2, 3, 16, 20) and starts[0, 0] == 0 and starts[0, 1] > 15 and starts[0, 2] > 30
    chunks.train()
    drawn = torch.stack([chunks.starts(spare, 8) for _ in range(40)]).flatten(0, 1)
    third = (spare + 1) // 3
    assert all(len(set(drawn[:, i].tolist())) > 10 for i in range(3)) and drawn.max() <= spare
    assert drawn[:, 0].max() <= third and drawn[:, 1].min() >= third and drawn[:, 2].min() >= 2 * third
    short = 0.1 * torch.randn(1, 1000)                                     # 3200 samples make 20 frames: said three times, then silence
    chunks.eval()
    said = F.pad(short.repeat(1, 3), (0, 200))
    torch.testing.assert_close(chunks(short), chunks(said))
    assert torch.equal(chunks(short)[:, 0], chunks(short)[:, 2])


def test_texts_are_drawn_by_origin_first():
    views = {"title": "t", "frames": [f"f{i}" for i in range(8)], "clip": "c", "polished": "p", "sound": ["s", " ", None]}
    counts, n = Counter(listed := in_views(views)), len(in_views(views))
    assert listed[0] == "t" and {k: v / n for k, v in counts.items()} == {
        "t": 0.2, "c": 0.2, "p": 0.2, "s": 0.2, **{f"f{i}": 0.025 for i in range(8)}}
    counts = Counter(in_views({"a": ["x", "y"], "b": "z", "none": []}, {"a": 1, "b": 3}))
    assert {k: v / sum(counts.values()) for k, v in counts.items()} == {"x": 0.125, "y": 0.125, "z": 0.75}
    assert in_views({}) == [] and in_views({"a": ""}) == []
    with pytest.raises(UserError, match="whole number from 1"):
        in_views({"a": "x"}, {"a": 0})


def test_a_table_may_hold_texts_by_origin(tmp_path):
    from polysense.data import source
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"image": "a.png", "caption": {"title": "a title", "frames": ["one frame", "another"]}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert source(tmp_path / "rows.jsonl", split="all")[0]["captions"] == ["a title", "a title", "one frame", "another"]


def test_maps_are_made_without_their_picture():
    from polysense.data import source
    from polysense.data.loader import Loader
    feed = recipe.tiny_depth().feed
    both, alone = (next(iter(Loader(source("scenes?n=8"), feed, None, batch_size=4, train=False, needs=needs))) for needs in (
        ("image", "depth"), ("depth",)))
    assert set(alone) == {"index", "depth"} and torch.equal(both["depth"], alone["depth"]) and alone["depth"].shape == (4, 1, 64, 64)


@torch.no_grad()
def test_without_a_tower_for_video_frames_are_read_as_pictures():
    torch.manual_seed(0)
    model, video = small(video=None).build().eval(), batch()["video"][:, :3]
    each = torch.stack([model.image.head(model.image.tower.pooled(f)) for f in video.unbind(1)], 1)
    torch.testing.assert_close(model.encode_video(video), F.normalize(each.mean(1), dim=-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name, value", [("audio", torch.zeros(2, 1, 800)), ("audio", torch.zeros(2, 0)), ("depth", torch.zeros(2, 3, 32, 32)),
                                         ("depth", torch.zeros(2, 1, 32, 40)), ("thermal", torch.zeros(2, 32, 32)),
                                         ("video", torch.zeros(2, 3, 32, 32)), ("video", torch.zeros(1, 3, 3, 32, 32)),
                                         ("video", torch.zeros(2, 0, 3, 32, 32)), ("image", torch.zeros(2, 4, 3, 32, 32))])
def test_wrong_shapes_are_refused_in_one_line(model, name, value):
    with pytest.raises(UserError) as caught:
        getattr(model, f"encode_{name}")(value)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_says_what_is():
    deaf = small(audio=None, image=None, video=None).build()
    for act in (lambda: deaf.encode_audio(torch.zeros(1, 4000)), lambda: deaf.sense("smell"), lambda: deaf.encode_video(torch.zeros(1, 4, 3, 8, 8))):
        with pytest.raises(UserError, match="depth, thermal"):
            act()
    with pytest.raises(UserError, match="nothing to bind"):
        deaf.embed({"text": torch.ones(2, 4, dtype=torch.long)})
    assert torch.equal(deaf.scale, deaf.depth.scale)


def test_sounds_and_videos_meet_pictures_and_words_on_the_command_line(tmp_path, capsys):
    soundfile, av = pytest.importorskip("soundfile"), pytest.importorskip("av")
    preset = recipe.tiny().but(config=small(depth=None, thermal=None), starts=(), stages=(stage_of("audio", 1),)).but(
        **{"feed.image.size": 32, "feed.text.vocab": 60, "feed.text.length": 8, "feed.audio.train_seconds": 0.3,
           "feed.video": recipe.VideoPlan(frames=4)})
    from polysense.train.run import train_preset
    list(train_preset("languagebind", preset.but(data="scenes:sounds?n=8&seconds=0.4"), ("text", "audio"), out=tmp_path / "run"))
    pipeline, rng = polysense.open(tmp_path / "run"), np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abc":
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    soundfile.write(tmp_path / "a.wav", rng.uniform(-0.5, 0.5, 9000), 16_000)
    with av.open(str(tmp_path / "m.mp4"), "w") as movie:
        stream = movie.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        for _ in range(6):
            movie.mux(stream.encode(av.VideoFrame.from_ndarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8), format="rgb24")))
        movie.mux(stream.encode())
    assert main(["index", str(folder), "-m", str(tmp_path / "run")]) == 0
    for flag, file, read in (("--audio", "a.wav", "audios"), ("--video", "m.mp4", "videos")):
        capsys.readouterr()
        assert main(["search", flag, str(tmp_path / file), "--index", str(folder), "--json"]) == 0
        hits = json.loads(capsys.readouterr().out)["hits"]
        asked = pipeline.encode(**{read: [tmp_path / file]})[0]
        cosines = pipeline.encode(images=[h["path"] for h in hits]) @ asked
        np.testing.assert_allclose([h["score"] for h in hits], cosines, atol=1e-4)
        assert len(hits) == 3 and list(cosines) == sorted(cosines, reverse=True)
    capsys.readouterr()
    assert main(["clips", str(tmp_path), "a red circle", "-m", str(tmp_path / "run"), "--of", "sounds", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hits"][0]["path"].endswith("a.wav")
    (tmp_path / "torn.wav").write_bytes(b"RIFF")
    assert main(["search", "--audio", str(tmp_path / "torn.wav"), "--index", str(folder)]) == 2
