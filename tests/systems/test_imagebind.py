"""ImageBind's essence (Girdhar et al. 2023)."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch
from PIL import Image

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.cli import main
from polysense.nn.attention import Attention, BiasAttention
from polysense.nn.head import Linear
from polysense.nn.mel import MelSpectrogram
from polysense.nn.tokens import ClipTokens, WindowTokens
from polysense.pipeline import Pipeline
from polysense.train.fit import fit

recipe = polysense.load("imagebind")
MEL = MelSpectrogram.Config(bins=16, frames=20)
CLIP_SAMPLES = 3200
BODY = recipe.clip_body(16, 1, 2)


def small(**but):
    senses = {"audio": recipe.bound(16, 2, 2, 12, 20.0, mel=MEL, kernel=8, stride=4),
              "depth": recipe.bound(16, 1, 2, 12, 5.0, tokens=recipe.plane(16)), "thermal": recipe.bound(16, 1, 2, 12, 10.0, tokens=recipe.plane(16)),
              "imu": recipe.bound(16, 1, 2, 12, 5.0, dropout=0.5, tokens=WindowTokens.Config(length=40, norm=recipe.LayerNorm.Config()))}
    return recipe.ImageBind.Config(**{**recipe.clip(16, 8, BODY, BODY, 12, recipe.LayerNorm.Config(), vocab=60, length=8, end=2), **senses,
                                      "clip_samples": CLIP_SAMPLES} | but)


@pytest.fixture()
def model():
    torch.manual_seed(0)
    return small().build().eval()


def batch(n: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"image": torch.randn(n, 3, 16, 16, generator=g), "audio": 0.1 * torch.randn(n, CLIP_SAMPLES, generator=g),
            "depth": torch.rand(n, 1, 16, 16, generator=g), "thermal": torch.rand(n, 1, 16, 16, generator=g),
            "imu": torch.randn(n, 6, 40, generator=g), "text": torch.randint(3, 60, (n, 6), generator=g)}


def test_the_loss_is_symmetric_infonce_at_a_fixed_temperature(model):
    b = batch()
    losses = model.bind(model.embed({k: b[k] for k in ("image", "audio", "depth")}))
    assert set(losses) == {"audio", "depth"}
    for name, scale in (("audio", 20.0), ("depth", 5.0)):
        logits = scale * model.encode_image(b["image"]) @ getattr(model, f"encode_{name}")(b[name]).T
        want = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
        torch.testing.assert_close(losses[name], want)
    parameters = dict(model.named_parameters())
    assert not any("audio.log_scale" in n for n in parameters) and "log_scale" in parameters, "only the text's factor can be learned"


def test_frozen_towers_are_bit_identical_after_audio_training(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stage = preset_of("imagebind").stages[0].but(steps=3, batch_size=4, precision="fp32").but(**{"optim.warmup": 0})
    pairs = [{k: v for k, v in batch(seed=s).items() if k in ("image", "audio")} for s in range(3)]
    list(fit(model, stage, pairs))
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith("audio.") for k in moved), "text's logit scale included"
    assert {k.split(".")[1] for k in moved} == {"tower", "head"}


def test_pairs_of_two_other_modalities_are_never_compared(model):
    """The gradient of the sound does not depend on the depth of the same batch, nor on a text."""
    b, want = batch(), {}
    for extra in ({}, {"depth": b["depth"]}, {"thermal": b["thermal"], "text": b["text"]}):
        model.zero_grad()
        model.bind(model.embed({"image": b["image"], "audio": b["audio"]} | extra))["audio"].backward()
        got = {n: p.grad.clone() for n, p in model.audio.named_parameters()}
        want = want or got
        assert all(torch.equal(got[n], want[n]) for n in got)
        assert all(p.grad is None or not p.grad.any() for n, p in model.named_parameters() if not n.startswith("audio."))


def test_a_repeated_frame_through_conv3d_is_a_conv2d_with_the_kernel_summed_over_time():
    tokens = ClipTokens.Config(size=16, patch=8, width=10).build()
    image = torch.randn(3, 3, 16, 16)
    want = F.conv2d(image, tokens.weight.sum(2), stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens(image), want, atol=1e-5, rtol=1e-4)
    clip = torch.randn(2, 2, 3, 16, 16)
    want = F.conv3d(clip.transpose(1, 2), tokens.weight, stride=(2, 8, 8)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens(clip), want, atol=1e-5, rtol=1e-4)
    flat = torch.randn(10, 3, 8, 8)
    tokens.weight.data.copy_(tokens.adapt("weight", flat))
    torch.testing.assert_close(tokens(image), F.conv2d(image, flat, stride=8).flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_a_still_video_is_its_picture_and_a_moving_one_sees_time(model):
    image, other = torch.randn(2, 2, 3, 16, 16).unbind(0)
    still = image[:, None].expand(-1, 5, -1, -1, -1)
    torch.testing.assert_close(model.encode_video(still), model.encode_image(image))
    a, b = model.encode_video(torch.stack([image, other], 1)), model.encode_video(torch.stack([other, image], 1))
    assert not torch.allclose(a, b, atol=1e-4), "the order of the two frames of a cube matters"
    torch.testing.assert_close(a.norm(dim=-1), torch.ones(2))


def test_vectors_leave_with_their_factor_and_encoders_with_norm_one(model):
    out = model.scaled(batch())
    for name, norm in (("image", 1), ("audio", 20), ("depth", 5), ("thermal", 10), ("imu", 5), ("text", 1 / 0.07)):
        torch.testing.assert_close(out[name].norm(dim=-1), torch.full((4,), float(norm)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(getattr(model, f"encode_{name}")(batch()[name]).norm(dim=-1), torch.ones(4))
    model.log_scale.data.fill_(9.0)
    torch.testing.assert_close(model.scaled(batch(), ["text"])["text"].norm(dim=-1), torch.full((4,), 100.0), rtol=1e-4, atol=1e-3)


def test_three_clips_evenly_over_a_longer_sound_are_averaged(model):
    audio = 0.1 * torch.randn(2, 3 * CLIP_SAMPLES + 100)
    spare = audio.shape[1] - CLIP_SAMPLES
    each = torch.stack([model.audio(audio[:, s:s + CLIP_SAMPLES]) for s in (0, spare // 2, spare)])
    torch.testing.assert_close(model.encode_audio(audio), F.normalize(each.mean(0), dim=-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.encode_audio(audio[:, :900]), model.audio(F.pad(audio[:, :900], (0, CLIP_SAMPLES - 900))))


def test_new_trunks_have_their_norms_learned_keys_and_class_token(model):
    for name in recipe.SENSES:
        tower = model.sense(name).tower
        assert all(isinstance(b.attn, BiasAttention) for b in tower.body.blocks) and isinstance(tower.patch.norm, torch.nn.LayerNorm)
        assert tower.norm_pre is None and isinstance(model.sense(name).head, Linear) and model.sense(name).head.bias is None
        x = batch()[name]
        x = F.pad(x, (0, 0)) if name != "audio" else x
        torch.testing.assert_close(tower(x).pooled, tower(x).tokens[:, 0])
    assert all(type(b.attn) is Attention for b in (*model.vision.body.blocks, *model.text.body.blocks))


def test_imu_head_drops_only_in_training(model):
    x = batch()["imu"]
    assert torch.equal(model.encode_imu(x), model.encode_imu(x))
    model.train()
    assert not torch.equal(model.encode_imu(x), model.encode_imu(x)) and model.imu.dropout == 0.5


def test_paper_preset_is_imagebind_huge():
    config = recipe.paper().config
    counts = {n: 1 + getattr(config, n).tower.tokens.count for n in recipe.SENSES}
    assert counts == {"audio": 229, "depth": 197, "thermal": 197, "imu": 251} and config.vision.tokens.count == 256
    assert {n: getattr(config, n).scale for n in recipe.SENSES} == {"audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}
    shapes = {n: (b.width, b.depth, b.heads) for n in recipe.SENSES for b in [getattr(config, n).tower.body]}
    assert shapes == {"audio": (768, 12, 12), "depth": (384, 12, 8), "thermal": (768, 12, 12), "imu": (512, 6, 8)}
    assert config.imu.tower.body.drop_path == 0.7 and config.imu.dropout == 0.5
    assert (config.audio.tower.front.mean, config.audio.tower.front.std) == (-4.268, 9.138) and config.clip_samples == 32000 and config.clips == 3
    assert config.vision.body.block.mlp.act == "gelu" and config.vision.body.norm.eps == 1e-6


def test_depth_preset_trains_depth():
    preset = recipe.tiny_depth()
    model = preset.config.build()
    stage = preset.stages[0]
    model.choose_trainable(stage.trainable)
    assert set(model.bind(model.embed(fake_batch(preset, ("image",)) | {"depth": torch.rand(4, 1, 64, 64)}))) == {"depth"}
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"depth"}


@pytest.mark.parametrize("name, value", [("audio", torch.zeros(2, 1, 800)), ("audio", torch.zeros(2, 0)), ("depth", torch.zeros(2, 3, 16, 16)),
                                         ("depth", torch.zeros(2, 1, 16, 32)), ("imu", torch.zeros(2, 5, 40)), ("imu", torch.zeros(2, 6, 30)),
                                         ("video", torch.zeros(2, 3, 16, 16)), ("video", torch.zeros(2, 2, 3, 16, 24)),
                                         ("image", torch.zeros(2, 2, 3, 16, 16))])
def test_wrong_shapes_are_refused_in_one_line(model, name, value):
    with pytest.raises(UserError) as caught:
        getattr(model, f"encode_{name}")(value)
    assert "\n" not in str(caught.value)


def test_what_is_not_bound_says_what_is():
    deaf = small(audio=None).build()
    for act in (lambda: deaf.encode_audio(torch.zeros(1, 4000)), lambda: deaf.embed({"image": torch.zeros(1, 3, 16, 16)}),
                lambda: deaf.sense("smell")):
        with pytest.raises(UserError, match="depth"):
            act()


def test_starts_turn_clips_patches_into_cubes():
    from types import SimpleNamespace

    from polysense.train.starts import carry
    torch.manual_seed(0)
    clip, ours = preset_of("clip", "tiny_vit").config.build().eval(), recipe.tiny().config.build().eval()
    for start in recipe.tiny().starts:
        carry(start, SimpleNamespace(system=clip), ours)
    image, text = torch.randn(2, 3, 64, 64), torch.tensor([[1, 9, 2], [1, 7, 2]])
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(image), clip.encode_image(image), atol=1e-5, rtol=1e-4)
        assert torch.equal(ours.encode_text(text), clip.encode_text(text)) and torch.equal(ours.log_scale, clip.log_scale)


def test_sounds_from_files_through_pipeline_and_command_line(tmp_path, monkeypatch, capsys):
    soundfile = pytest.importorskip("soundfile")
    preset = recipe.tiny().but(config=small(), starts=()).but(**{"feed.image.size": 16, "stages.0.steps": 1, "stages.0.batch_size": 4,
                                                                "feed.audio.train_seconds": 0.2})
    from polysense.train.run import train_preset
    list(train_preset("imagebind", preset.but(data="scenes:sounds?n=8&seconds=0.3"), ("image", "audio"), out=tmp_path / "run"))
    pipeline = polysense.open(tmp_path / "run")
    folder = tmp_path / "sounds"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, rate in (("a.wav", 16000), ("b.flac", 8000)):
        soundfile.write(folder / name, rng.uniform(-0.5, 0.5, rate), rate)
    vectors = pipeline.encode(audios=[folder / "a.wav", folder / "b.flac"])
    assert vectors.shape == (2, 12) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    (folder / "torn.wav").write_bytes(b"RIFF")
    assert main(["encode", str(folder), "-m", str(tmp_path / "run"), "--out", str(tmp_path / "v.npz"), "--json"]) == 0
    said = capsys.readouterr().out
    assert '"encoded": 2' in said and "torn.wav" in said
    np.testing.assert_allclose(np.load(tmp_path / "v.npz")["vector"], vectors, atol=1e-5)
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in "abc":
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(photos / f"{name}.png")
    assert main(["index", str(photos), "-m", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["search", "--audio", str(folder / "a.wav"), "--index", str(photos), "--why", str(tmp_path / "why.png"), "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    cosines = pipeline.encode(images=[h["path"] for h in hits]) @ vectors[0]
    np.testing.assert_allclose([h["score"] for h in hits], cosines, atol=1e-4)
    assert len(hits) == 3 and list(cosines) == sorted(cosines, reverse=True) and (tmp_path / "why.png").exists()
    assert main(["search", "--audio", str(folder / "none.wav"), "--index", str(photos)]) == 2
    assert main(["search", "--audio", str(folder / "torn.wav"), "--index", str(photos)]) == 2
    assert main(["search", "rain", "--audio", str(folder / "a.wav"), "--index", str(photos)]) == 2
    with pytest.raises(UserError, match="not finite"):
        broken = Pipeline(small().build(), preset, id="imagebind")
        broken.system.audio.head.weight.data.fill_(float("nan"))
        broken.encode(audios=[folder / "a.wav"])
    import sys
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert main(["encode", str(folder), "-m", str(tmp_path / "run"), "--out", str(tmp_path / "w.npz")]) == 2
    assert "polysense[audio]" in capsys.readouterr().err
