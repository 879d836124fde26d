"""NeRF's essence (Mildenhall et al. 2020)."""
from math import exp, pi

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.data import source
from polysense.data.rays import around, camera_rays, on_white, project
from polysense.data.solids import trace
from polysense.decoders.radiance import Radiance, Waves
from polysense.decoders.render import HUGE, composed, finer, lengths, ndc, stratified, weights
from polysense.pipeline import Pipeline
from polysense.tasks import take
from polysense.train.fit import fit
from polysense.weights.convert import export, import_

recipe = polysense.load("nerf")


@pytest.fixture()
def nerf():
    torch.manual_seed(0)
    return preset_of("nerf").config.build()


@pytest.fixture(scope="module")
def batch():
    return fake_batch(preset_of("nerf"), ("origin", "direction", "rgb"), n=8)


@pytest.mark.parametrize(("unit", "factor"), [("one", 1.0), ("pi", pi)])
def test_waves_are_those_of_equation_4_with_and_without_pi_and_place(unit, factor):
    p = torch.randn(5, 3)
    want = torch.cat([f(2.0 ** k * factor * p) for k in range(4) for f in (torch.sin, torch.cos)], -1)
    torch.testing.assert_close(Waves(Waves.Config(levels=4, unit=unit, first=""))(p), want)
    whole = Waves(Waves.Config(levels=4, unit=unit))
    torch.testing.assert_close(whole(p), torch.cat([p, want], -1))
    assert whole.width == 27 and Waves(Waves.Config(levels=10)).width == 63


def test_density_does_not_see_the_direction_but_colour_does():
    torch.manual_seed(0)
    net, place, direction = Radiance(Radiance.Config(width=16, depth=3, skip=2)), torch.randn(4, 5, 3), F.normalize(torch.randn(4, 3), dim=-1)
    direction.requires_grad_(True)
    density, colour = net(place, direction)
    assert torch.autograd.grad(density.sum(), direction, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(colour.sum(), direction)[0].abs().sum() > 0
    early = Radiance(Radiance.Config(width=16, depth=3, skip=2, view="early"))
    assert torch.autograd.grad(early(place, direction)[0].sum(), direction)[0].abs().sum() > 0


def test_place_is_read_again_at_the_skip_and_feature_is_linear():
    net = Radiance(Radiance.Config())
    assert [layer.in_features for layer in net.layers] == [63, 256, 256, 256, 256, 63 + 256, 256, 256]
    assert net.late.in_features == 256 + 27 and net.late.out_features == 128
    place = torch.randn(1, 1, 3)
    code = net.place(place)
    x = code
    for i, layer in enumerate(net.layers):
        x = layer(torch.cat([code, x], -1) if i == 5 else x).relu()
    torch.testing.assert_close(net(place, torch.ones(1, 3))[0], net.density(x)[..., 0])
    want = net.colour(net.late(torch.cat([net.feature(x), net.direction(torch.ones(1, 1, 3))], -1)).relu()).sigmoid()
    torch.testing.assert_close(net(place, torch.ones(1, 3))[1], want)


def test_weights_are_those_of_the_plain_loop_and_sum_to_what_is_opaque():
    density, length = torch.rand(6, 9) * 3, torch.rand(6, 9)
    w = weights(density, length)
    alpha = 1 - torch.exp(-density * length)
    for r in range(6):
        left = 1.0
        for i in range(9):
            assert w[r, i].item() == pytest.approx(left * alpha[r, i].item(), abs=1e-6)
            left *= 1 - alpha[r, i].item()
    assert (w >= 0).all() and (w.sum(1) <= 1 + 1e-6).all()
    torch.testing.assert_close(w.sum(1), 1 - (1 - alpha).prod(1))


@pytest.mark.parametrize("samples", [1, 7, 64])
def test_a_slab_of_constant_density_has_its_closed_form_for_any_number_of_samples(samples):
    w = weights(torch.full((1, samples), 1.7), torch.full((1, samples), 0.8 / samples))
    assert w.sum().item() == pytest.approx(1 - exp(-1.7 * 0.8), abs=1e-6)


def test_splitting_a_segment_changes_nothing_and_reversing_the_order_does():
    density, length, colour = torch.tensor([[0.5, 2.0, 1.0]]), torch.tensor([[0.3, 0.5, 0.2]]), torch.rand(1, 3, 3)
    at = torch.zeros(1, 3)
    whole = composed(weights(density, length), colour, at, 1.0).colour
    twice = [v.repeat_interleave(torch.tensor([1, 2, 1]), 1) for v in (density, length * torch.tensor([1.0, 0.5, 1.0]), colour, at)]
    torch.testing.assert_close(composed(weights(twice[0], twice[1]), twice[2], twice[3], 1.0).colour, whole)
    other = composed(weights(density.flip(1), length.flip(1)), colour.flip(1), at, 1.0).colour
    assert not torch.allclose(other, whole, atol=1e-3)


def test_background_shines_through_what_is_not_opaque():
    w, colour, at = torch.tensor([[0.25, 0.25]]), torch.zeros(1, 2, 3), torch.tensor([[2.0, 4.0]])
    shown = composed(w, colour, at, 1.0)
    torch.testing.assert_close(shown.colour, torch.full((1, 3), 0.5))
    assert shown.opacity.item() == 0.5 and shown.depth.item() == 1.5 and (composed(w, colour, at, None).colour == 0).all()
    assert lengths(torch.tensor([[1.0, 3.0, 4.0]])).tolist() == [[2.0, 1.0, HUGE]]


def test_stratified_samples_lie_one_in_each_part():
    at = stratified(2.0, 6.0, 50, 8, torch.zeros(1), True)
    assert torch.equal(((at - 2) / 0.5).floor(), torch.arange(8.0).expand(50, -1)) and at.std(0).min() > 0.05
    assert torch.equal(stratified(2.0, 6.0, 1, 2, torch.zeros(1), False), torch.tensor([[3.0, 5.0]]))


def test_finer_samples_follow_the_weights_by_a_kolmogorov_smirnov_test():
    torch.manual_seed(0)
    at = torch.linspace(0, 1, 12)[None]
    w = torch.tensor([[9.0, 0.0, 1.0, 4.0, 0.0, 0.0, 2.0, 8.0, 1.0, 0.0, 3.0, 9.0]]).requires_grad_(True)
    drawn = finer(at, w, 20_000, True)
    edge = (at[0, 1:] + at[0, :-1]) / 2
    sums = torch.cat([torch.zeros(1), (w.detach()[0, 1:-1] + 1e-5).cumsum(0)])
    value = drawn[0].sort().values.numpy()
    want = np.interp(value, edge.numpy(), (sums / sums[-1]).numpy())
    gap = np.abs(want - (np.arange(20_000) + 0.5) / 20_000).max()
    assert gap < 1.63 / 20_000 ** 0.5 + 0.5 / 20_000, "1 % level"
    assert not drawn.requires_grad and drawn.min() >= edge[0] and drawn.max() <= edge[-1]
    even = finer(at, w, 9, False)
    assert (even.diff() >= 0).all() and torch.equal(even, finer(at, w, 9, False))


def test_fine_network_sees_the_sorted_union_and_no_gradient_passes_through_the_choice(nerf, batch):
    coarse, fine = nerf.train().render(batch["origin"], batch["direction"])
    assert coarse.at.shape == (8, 24) and fine.at.shape == (8, 48) and (fine.at.diff(dim=1) >= 0).all() and not fine.at.requires_grad
    assert all(any(torch.isclose(v, c) for v in fine.at[0]) for c in coarse.at[0][:3])
    fine.colour.sum().backward()
    assert all(p.grad is None for p in nerf.coarse.parameters()) and all(p.grad is not None for p in nerf.fine.parameters())


def test_loss_is_the_error_of_both_networks(nerf, batch):
    nerf.eval()
    shown, losses = nerf.render(batch["origin"], batch["direction"]), nerf.photometric(batch)
    for name, one in zip(("coarse", "fine"), shown, strict=True):
        assert losses[name].item() == pytest.approx((one.colour - batch["rgb"]).square().mean().item(), rel=1e-5)


def test_density_noise_is_of_training_alone(batch):
    torch.manual_seed(0)
    nerf = preset_of("nerf").but(**{"config.noise": 3.0, "config.samples": 8}).config.build()
    rays = batch["origin"], batch["direction"]
    assert torch.equal(nerf.eval().render(*rays)[0].colour, nerf.render(*rays)[0].colour)
    nerf.train()
    torch.manual_seed(1)
    one = nerf.render(*rays)[0]
    torch.manual_seed(1)
    nerf.noise = 0.0
    other = nerf.render(*rays)[0]
    assert torch.equal(one.at, other.at) and not torch.allclose(one.colour, other.colour)


def test_rays_follow_the_camera():
    pose, size, focal = around(0.7, 0.4, 4.0), (7, 9), 8.0
    origin, direction = camera_rays(size, focal, pose)
    middle = direction.reshape(7, 9, 3)[3, 4]
    assert np.allclose(middle, -pose[:3, 2], atol=1e-6) and np.allclose(middle, -pose[:3, 3] / 4, atol=1e-6), "looks at the origin"
    assert np.allclose(np.linalg.norm(direction, axis=1), 1, atol=1e-6) and np.allclose(origin, pose[:3, 3])
    pixel = project(origin + direction * np.linspace(1, 5, 63)[:, None], size, focal, pose)
    rows, columns = np.divmod(np.arange(63), 9)
    assert np.allclose(pixel, np.stack([columns, rows], 1), atol=1e-4)
    assert direction.reshape(7, 9, 3)[0, 4, 2] > direction.reshape(7, 9, 3)[6, 4, 2], "rows go down"


def test_device_coordinates_put_a_far_point_at_distance_one():
    origin, direction = torch.tensor([[0.2, -0.1, 0.3]]), F.normalize(torch.tensor([[0.1, 0.2, -1.0]]), dim=-1)
    o, d = ndc(origin, direction, (1.6, 2.0))
    for depth in (1.0, 3.0, 1e6):            # points of the ray with z = -depth: perspective projection of each
        t = (-depth - origin[0, 2]) / direction[0, 2]
        p = origin[0] + t * direction[0]
        want = torch.stack([1.6 * p[0] / depth, 2.0 * p[1] / depth, 1 - 2 / torch.tensor(depth)])
        torch.testing.assert_close((o + (1 - 1 / depth) * d)[0], want, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    facing = preset_of("nerf").but(**{"config.ndc": (1.6, 2.0), "config.near": 0.0, "config.far": 1.0, "config.background": None}).config.build()
    losses = facing.photometric({"origin": origin, "direction": direction, "rgb": torch.rand(1, 3)})
    assert losses["fine"].isfinite()


def test_transparent_photographs_are_laid_on_white():
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    assert np.allclose(on_white(rgba), [[[1, 0, 0], [1, 1, 1], [0.8, 0.8, 0.8]]], atol=1e-6)
    assert on_white(np.zeros((1, 1, 3), np.uint8)).max() == 0


def test_traced_solids_are_where_they_should_be():
    origin = np.array([[4.0, 0.35, 0.0], [4.0, 0.35, 2.0], [0.05, -0.55, 4.0]])
    colour, distance = trace(origin, np.array([[-1.0, 0, 0], [-1.0, 0, 0], [0, 0, -1.0]]))
    assert distance[0] == pytest.approx(4.0 - 0.45 - 0.5) and colour[0].argmax() == 0
    assert np.isinf(distance[1]) and (colour[1] == 1).all() and distance[2] == pytest.approx(4.0 - 0.55)
    one, other = (trace(np.array([[0.45, 0.35, 0.0]]) - 3 * d, d)[0] for d in (np.array([[-0.6, 0, -0.8]]), np.array([[0.6, 0, -0.8]])))
    assert not np.allclose(one, other), "the ball shines"


def test_solids_offer_rays_that_differ_between_splits():
    train, test = source("solids?views=3&size=8"), source("solids?views=3&size=8", "test")
    assert len(train) == 3 * 64 and len(test) == 6 * 64 and {"origin", "direction", "rgb"} <= set(train.offers)
    gap = np.linalg.norm(train.cameras.pose[:, None, :3, 3] - test.cameras.pose[None, :, :3, 3], axis=-1)
    assert gap.min() > 0.1
    for spec in ("solids?views=0", "solids?seze=3", "solids?size=many"):
        with pytest.raises(UserError):
            source(spec)


def test_a_few_steps_bring_the_colours_nearer(nerf):
    from polysense.data.loader import Loader

    preset = preset_of("nerf").but(**{"stages.0.steps": 25, "stages.0.batch_size": 64})
    loader = Loader(source("solids?views=4&size=12"), preset.feed, None, batch_size=64, needs=("origin", "direction", "rgb"))
    losses = [step.total for step in fit(nerf, preset.stages[0], loader)]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5]), losses[::5]


def test_views_exam_scores_true_views_highest_and_knows_distances(nerf):
    test = source("solids?views=2&size=16", "test")

    class Traced(torch.nn.Module):
        def view(self, origin, direction):
            from polysense.decoders.render import Rendered
            colour, distance = (torch.from_numpy(v) for v in trace(origin.numpy(), direction.numpy()))
            return Rendered(colour, distance.nan_to_num(posinf=0.0), distance, distance, distance)

        def render_view(self, origin, direction):
            return self.view(origin, direction).colour
    exact = take("views", Pipeline(Traced(), preset_of("nerf")), test)
    assert exact.metrics["psnr"].value > 60 and exact.metrics["ssim"].value > 0.999 and exact.metrics["depth_error"].value < 1e-4
    got = take("views", Pipeline(nerf, preset_of("nerf")), test)
    assert got.n == 6 and got.metrics["psnr"].value < 30 and got.metrics["depth_error"].value > 0.1


def test_pipeline_walks_around(nerf):
    pipeline = Pipeline(nerf, preset_of("nerf"), id="nerf")
    views = pipeline.render(3, size=8)
    assert len(views) == 3 and views[0].size == (8, 8) and np.asarray(views[0]).std() >= 0
    origin, direction = (torch.from_numpy(v) for v in camera_rays((8, 8), 4 / np.tan(nerf.fov / 2), around(0.0, np.radians(30), nerf.distance)))
    with torch.inference_mode():
        want = (nerf.render_view(origin, direction).view(8, 8, 3).clamp(0, 1) * 255).round()
    assert np.allclose(np.asarray(views[0]), want.numpy(), atol=1)
    for wrong in ({"turn": 0}, {"size": 1}, {"elevation": 100}, {"distance": -1.0}):
        with pytest.raises(UserError):
            pipeline.render(**wrong)
    nerf.fine.density.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        pipeline.render(1, size=4)
    with pytest.raises(UserError, match="cannot render_view"):
        Pipeline(preset_of("supervised").config.build(), preset_of("supervised")).render()


@pytest.mark.parametrize(("origin", "direction"), [
    (torch.randn(2, 3), torch.randn(3, 3)), (torch.randn(2, 2), torch.randn(2, 2)), (torch.ones(2, 3, dtype=torch.long), torch.randn(2, 3)),
    (torch.randn(3), torch.randn(3)), (torch.randn(0, 3), torch.randn(0, 3))])
def test_other_rays_are_refused(nerf, origin, direction):
    with pytest.raises(UserError, match="rays are float"):
        nerf.render_view(origin, direction)


def test_nerf_pytorch_files_both_ways(tmp_path):
    """Their file, written down by hand: two states beside an optimiser's."""
    g, file = torch.Generator().manual_seed(0), {"global_step": 7, "optimizer_state_dict": {"state": {}, "param_groups": []}}
    for net in ("network_fn_state_dict", "network_fine_state_dict"):
        shapes = {f"pts_linears.{i}": (16, 63 if i == 0 else 79 if i == 2 else 16) for i in range(4)}
        shapes |= {"views_linears.0": (8, 16 + 27), "feature_linear": (16, 16), "alpha_linear": (1, 16), "rgb_linear": (3, 8)}
        file[net] = {f"{k}.{p}": torch.randn(s if p == "weight" else s[:1], generator=g) * 0.3 for k, s in shapes.items() for p in ("weight", "bias")}
    torch.save(file, tmp_path / "200000.tar")
    layout = recipe.weights["nerf_pytorch"]
    system, preset = import_(tmp_path / "200000.tar", layout, lambda name: preset_of("nerf", name))
    assert preset.config.fine.skip == 2 and preset.config.coarse.depth == 4 and preset.config.fine.place.levels == 10
    theirs, place, direction = file["network_fine_state_dict"], torch.randn(2, 3), F.normalize(torch.randn(2, 3), dim=-1)

    def code(x, levels):
        return torch.cat([x, *(f(x * 2.0 ** k) for k in range(levels) for f in (torch.sin, torch.cos))], -1)

    def linear(name, x):
        return F.linear(x, theirs[f"{name}.weight"], theirs[f"{name}.bias"])
    h = code(place, 10)
    for i in range(4):
        h = linear(f"pts_linears.{i}", h).relu()
        h = torch.cat([code(place, 10), h], -1) if i == 1 else h
    rgb = linear("rgb_linear", linear("views_linears.0", torch.cat([linear("feature_linear", h), code(direction, 4)], -1)).relu()).sigmoid()
    density, colour = system.fine(place[:, None], direction)
    torch.testing.assert_close(density[:, 0], linear("alpha_linear", h)[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(colour[:, 0], rgb, rtol=1e-4, atol=1e-4)
    export(system.state_dict(), preset.config, layout, tmp_path / "out.safetensors")
    from safetensors.torch import load_file
    back = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(back[f"{n}.{k}"], v) for n in ("network_fn_state_dict", "network_fine_state_dict") for k, v in file[n].items())
    with pytest.raises(UserError, match="late directions"):
        layout.write(preset_of("nerf").config.but(**{"fine.view": "early"}))


def test_command_line_trains_and_renders(tmp_path, capsys):
    from PIL import Image

    from polysense.cli import main
    assert main(["train", "nerf", "--data", "solids?views=2&size=8", "--steps", "1", "--out", str(tmp_path / "run"), "--json",
                 "stages.0.batch_size=16"]) == 0
    assert main(["render", "-m", str(tmp_path / "run"), "--turn", "3", "--size", "8", "--out", str(tmp_path / "v.png"), "--json"]) == 0
    assert Image.open(tmp_path / "v.png").size[0] == 24
    assert main(["render", "-m", str(tmp_path / "run"), "--turn", "2", "--size", "8", "--out", str(tmp_path / "v.gif")]) == 0
    assert Image.open(tmp_path / "v.gif").n_frames == 2
    capsys.readouterr()
    assert main(["render", "-m", str(tmp_path / "run"), "--out", "v.bmp"]) == 2 and ".png or .gif" in capsys.readouterr().err
