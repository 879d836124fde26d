"""BEVT's essence (Wang et al. 2022)."""
import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.decoders.codes import CodeTarget
from polysense.decoders.vq_codec import ConvDecoder, ConvEncoder, VectorQuantizer, VQCodec
from polysense.mechanisms.mask_sampler import BlockMask
from polysense.mechanisms.span_mask import SpanMask
from polysense.towers.swin import WindowBlock
from polysense.towers.swin3d import CubeBlock, Swin3D, from_cubes, into_cubes
from polysense.train.fit import fit
from polysense.train.run import load_run, train_preset

recipe = polysense.load("bevt")
CODEC = VQCodec.Config(encoder=ConvEncoder.Config(width=8, hidden=4, out=4), decoder=ConvDecoder.Config(into=4, width=8, hidden=4),
                       quantizer=VectorQuantizer.Config(codes=10, width=4, std=1.0))
TARGET = CodeTarget.Config(codec=CODEC, size=16, mean=recipe.HALF, std=recipe.HALF)
TRUNK = Swin3D.Config(patch=(2, 2, 2), base=4, depths=(1, 2, 2), heads=(1, 1, 2), window=(2, 2, 2))


@pytest.fixture()
def system():
    torch.manual_seed(0)
    return recipe.config(TRUNK, TARGET, 8, 2).build()


@pytest.fixture(scope="module")
def batch():
    g = torch.Generator().manual_seed(1)
    return {"image": torch.randn(3, 3, 16, 16, generator=g), "video": torch.randn(3, 8, 3, 16, 16, generator=g)}


def shaken(module):
    torch.manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return module


# -- the trunk --------------------------------------------------------------------------------------------------------------------------

def test_paper_is_the_papers():
    c = preset_of("bevt", "paper").config
    assert (c.encoder.patch, c.encoder.base, c.encoder.depths, c.encoder.window) == ((2, 4, 4), 128, (2, 2, 18, 2), (8, 7, 7))
    assert (c.encoder.heads, c.encoder.drop_path) == ((4, 8, 16, 32), 0.3)
    assert (c.video_mask.frame.hidden, c.image_mask, c.video_mask.shortest, c.target.size, c.target.width) == (98, c.video_mask.frame, 0.5, 112, 8192)
    feed, stage = preset_of("bevt", "paper").feed, preset_of("bevt", "paper").stages[0]
    view = feed.train_image
    assert (view.jitter, view.jitter_by, view.flip, view.sides) == (1.0, (0.4, 0.4, 0.4, 0.0), 0.5, (256, 320))
    assert (feed.video.view.sides, feed.video.view.flip, feed.video.view.jitter, feed.video.repeat) == ((256, 320), 0.5, 0.0, 1)
    assert (feed.video.frames, feed.video.stride, stage.optim.lr, stage.optim.weight_decay, stage.optim.clip) == (16, 8, 5e-4, 0.05, 3.0)
    for name in ("tiny", "paper"):
        starts = {s.into: s.preset for s in preset_of("bevt", name).starts if s.from_ == "bevt"}
        assert starts == {p: f"{name}_pictures" for p in ("encoder", "decoder", "token")}, "stage 2 starts from stage 1"
    with torch.device("meta"):
        system = c.build()
        before, last = system.encoder.features(torch.empty(1, 16, 3, 224, 224))[-2:]
        assert before.shape == (1, 8, 14, 14, 512) and last.shape == (1, 8, 7, 7, 1024)
        said = system.named(system.decoder.of_clip(before, last))
        assert said.flatten(1, 3).shape == (1, 16 * 196, 8192), "an answer for all 16 frames"


@torch.no_grad()
def test_a_picture_repeated_is_the_picture(system):
    shaken(system)
    system.after_start()
    image = torch.randn(2, 3, 16, 16)
    still, moving = (system.encoder.embed(x) for x in (image, image[:, None].expand(-1, 4, -1, -1, -1)))
    assert still.shape == (2, 1, 8, 8, 4) and moving.shape == (2, 2, 8, 8, 4)
    torch.testing.assert_close(moving, still.expand_as(moving))


@torch.no_grad()
def test_a_picture_is_looked_at_through_biases_of_no_offset_in_time():
    """A block on a map of T = 1 is Swin's own block with the middle of the table."""
    for shift in ((0, 0, 0), (1, 2, 2)):
        cube = shaken(CubeBlock.Config(width=8, heads=2, window=(3, 4, 4), shift=shift).build())
        flat = WindowBlock.Config(width=8, heads=2, window=4, shift=shift[1]).build()
        state = {k: v for k, v in cube.state_dict().items() if k != "table"}
        flat.load_state_dict({**state, "table": cube.table.unflatten(0, (5, -1))[2]})
        x = torch.randn(2, 1, 6, 10, 8)
        torch.testing.assert_close(cube(x), flat(x[:, 0])[:, None], rtol=1e-4, atol=1e-5)


def test_windows_are_cut_and_put_together_again():
    x = torch.randn(2, 4, 6, 4, 3)
    cubes = into_cubes(x, (2, 3, 2))
    assert torch.equal(cubes[1].view(2, 3, 2, 3), x[0, :2, :3, 2:4]) and torch.equal(from_cubes(cubes, (2, 3, 2), (4, 6, 4)), x)


@torch.no_grad()
def test_inflation_copies_biases_to_all_offsets_in_time(system):
    shaken(system)
    block = system.encoder.stages[1].blocks[0]
    middle = block.table.unflatten(0, (3, -1))[1].clone()
    system.after_start()
    assert all(torch.equal(rows, middle) for rows in block.table.unflatten(0, (3, -1)))
    weight = system.encoder.patch.weight
    torch.testing.assert_close(weight[:, :, 0] * 2, system.encoder.still.weight)
    assert torch.equal(weight[:, :, 0], weight[:, :, 1])


def test_both_streams_pass_the_same_weights_and_have_their_own_ways_in_and_out(system, batch):
    names = {n: p for n, p in system.named_parameters()}

    def reached(term):
        grads = torch.autograd.grad(term, list(names.values()), allow_unused=True)
        return {n for n, g in zip(names, grads, strict=True) if g is not None and float(g.abs().sum()) > 0}

    image, video = reached(system.look(batch)["image"]), reached(system.watch(batch)["video"])
    shared = image & video
    assert {n for n in names if n.startswith("encoder.stages.") and not n.endswith(".table") and "attn.k.bias" not in n} <= shared
    assert {"decoder.classify.weight", "token", "encoder.norm.weight"} <= shared
    own = {n.split(".")[1] for n in image - video if not n.endswith("table")}
    assert {"still", "still_norm"} <= own and not any(n.startswith(("encoder.patch", "decoder.moving", "decoder.times")) for n in image)
    assert not any(n.startswith(("encoder.still", "decoder.still")) for n in video)
    assert not {n for n in names if n.startswith("target.")} & (image | video)


def test_a_step_on_pictures_changes_what_is_said_of_clips(system, batch):
    mask = torch.zeros(3, 4, 4, 4, dtype=torch.bool)
    before = system.name_clip(batch["video"], mask)
    list(fit(system, recipe.tiny_pictures().stages[0].but(steps=1, batch_size=3, **{"optim.warmup": 0}), iter([batch])))
    assert not torch.allclose(system.name_clip(batch["video"], mask), before, atol=1e-4)


# -- masks ------------------------------------------------------------------------------------------------------------------------------

def test_a_tube_lasts_half_to_all_of_the_times_and_may_wrap_around():
    torch.manual_seed(0)
    sampler = SpanMask.Config(frame=BlockMask.Config(hidden=98, least=16, fill="exact")).build()
    mask = sampler(200, (8, 14, 14)).mask.view(200, 8, 196)
    on = mask.any(-1)
    lengths = on.sum(1)
    assert int(lengths.min()) == 4 and int(lengths.max()) == 8 and set(lengths.tolist()) == {4, 5, 6, 7, 8}
    assert all(int((row != row.roll(1)).sum()) == (0 if row.all() else 2) for row in on), "one run, around the end"
    assert any(bool(row[0] and row[-1] and not row.all()) for row in on)
    for clip, row in zip(mask, on, strict=True):
        hidden = clip[row]
        assert (hidden == hidden[0]).all() and int(hidden[0].sum()) == 98
    assert int((sampler(3, (1, 14, 14)).mask.sum(1) == 98).sum()) == 3
    with pytest.raises(UserError, match="shortest"):
        SpanMask.Config(frame=BlockMask.Config(), shortest=0.0).build()


@torch.no_grad()
def test_the_mask_is_repeated_to_the_patches_and_hides_what_lies_behind(system, batch):
    mask = torch.zeros(3, 4, 4, 4, dtype=torch.bool)
    mask[:, 1:3, 1, 2] = True
    x, token = system.encoder.embed(batch["video"], (mask, system.token)), system.token.flatten()
    hidden = (x == token).all(-1)
    assert torch.equal(hidden, mask.repeat_interleave(2, 2).repeat_interleave(2, 3))
    said = system.name_clip(batch["video"], mask)
    other = batch["video"].clone()
    other[:, 2:6, :, 4:8, 8:12] = torch.randn(3, 4, 3, 4, 4)
    torch.testing.assert_close(system.name_clip(other, mask), said)
    other[:, 0] += 1
    assert not torch.allclose(system.name_clip(other, mask), said, atol=1e-3)


# -- answers ----------------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_every_frame_is_answered_and_only_what_was_hidden_counts(system, batch):
    ids = system.codes(batch["video"])
    assert ids.shape == (3, 8, 4, 4)
    assert torch.equal(ids[1, 5], system.target.ids(batch["video"][1, 5:6])[0]), "the codes of every frame, by itself"
    mask = torch.zeros(3, 4, 4, 4, dtype=torch.bool)
    mask[:, 2, :2] = True
    system.video_mask.forward = lambda *a: type("M", (), {"mask": mask.flatten(1)})()
    logits = system.name_clip(batch["video"], mask)
    assert logits.shape == (3, 8, 4, 4, 10)
    want = F.cross_entropy(logits[:, 4:6, :2].flatten(0, -2), ids[:, 4:6, :2].flatten())
    torch.testing.assert_close(system.watch(batch)["video"], want)
    both = system.losses(batch)
    assert set(both) == {"image", "video"} and not recipe.tiny().stages[0].weights, "weight 1 each, both in every step"


@torch.no_grad()
def test_answers_read_the_last_map_enlarged_beside_the_one_before_behind_one_norm(system, batch):
    shaken(system)
    before, last = torch.randn(1, 1, 4, 4, 8), torch.randn(1, 1, 2, 2, 16)
    rise, d, norm = system.decoder.still, system.decoder, system.encoder.norm
    grown = rise.grow(last[:, 0].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(d.of_picture(before, last), rise.down(torch.cat([before[:, 0], grown], -1)))
    mask = torch.zeros(3, 4, 4, 4, dtype=torch.bool)
    for said, risen in ((system.name_picture(batch["image"], mask[:, 0]), d.of_picture(*system.maps(batch["image"], mask[:, :1]))),
                        (system.name_clip(batch["video"], mask), d.of_clip(*system.maps(batch["video"], mask)))):
        torch.testing.assert_close(said, d.classify(F.layer_norm(risen, (16,), norm.weight, norm.bias)))
    moved = d.of_clip(before.expand(-1, 3, -1, -1, -1), last.expand(-1, 3, -1, -1, -1))
    assert moved.shape == (1, 6, 4, 4, 16) and not torch.allclose(moved[0, 0], moved[0, 1]), "the two frames of a time are told apart"


# -- training and use -------------------------------------------------------------------------------------------------------------------

def test_stages_lower_their_losses(system, batch):
    for plan in (recipe.tiny_pictures(), recipe.tiny()):
        stage = plan.stages[0].but(steps=12, batch_size=3, **{"optim.warmup": 0, "optim.lr": 3e-3})
        steps = list(fit(system, stage, iter([batch] * 12)))
        assert min(s.total for s in steps[6:]) < steps[0].total


def test_stage_2_begins_with_what_stage_1_learned_inflated(tmp_path, monkeypatch):
    """Through the runs that a preset stands on: tokenizer, stage 1, stage 2, a step each."""
    from polysense.systems.generate import vq_vae

    monkeypatch.setenv("POLYSENSE_CACHE", str(tmp_path / "cache"))
    data = {"data": "scenes:clips?size=32&frames=8&n=8", "stages.0.steps": 1, "stages.0.batch_size": 4}
    small, first = (f().but(**data) for f in (vq_vae.small, recipe.tiny_pictures))
    monkeypatch.setattr(vq_vae, "small", lambda: small)
    monkeypatch.setattr(recipe, "tiny_pictures", lambda: first)
    plan = recipe.tiny().but(**{**data, "stages.0.optim.lr": 0.0})
    list(train_preset("bevt", plan, ("image", "video|image"), out=tmp_path / "run", seed=0, workers=0, device="cpu"))
    made = load_run(tmp_path / "run").system
    runs = {p.name.rsplit("-", 1)[0]: p for p in (tmp_path / "cache" / "runs").iterdir()}
    before, codec = load_run(runs["bevt-tiny_pictures"]).system, load_run(runs["vq_vae-small"]).system.codec
    assert torch.equal(made.encoder.stages[1].blocks[1].mlp.up.weight, before.encoder.stages[1].blocks[1].mlp.up.weight)
    assert torch.equal(made.decoder.still.down.weight, before.decoder.still.down.weight) and torch.equal(made.token, before.token)
    torch.testing.assert_close(made.encoder.patch.weight[:, :, 1] * 2, before.encoder.still.weight)
    assert all(torch.equal(v, made.target.codec.state_dict()[k]) for k, v in codec.state_dict().items())


def test_features_are_of_unit_length_and_bad_input_is_one_line(system, batch):
    system.eval()
    for out in (system.encode_image(batch["image"]), system.encode_video(batch["video"])):
        torch.testing.assert_close(out.norm(dim=-1), torch.ones(3))
    for ask in (lambda: system.encode_video(batch["image"]), lambda: system.encode_image(batch["video"]),
                lambda: system.encode_video(torch.randn(1, 3, 3, 16, 16)), lambda: system.encode_image(torch.randn(1, 3, 15, 16)),
                lambda: system.watch({"image": batch["image"]}), lambda: system.codes(torch.randn(1, 3, 32, 32)),
                lambda: Swin3D.Config(depths=(2,), heads=(1, 2)).build(), lambda: Swin3D.Config(patch=(2, 4, 2)).build()):
        with pytest.raises(UserError) as caught:
            ask()
        assert "\n" not in str(caught.value)
