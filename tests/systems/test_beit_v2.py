"""BEiT v2's essence (Peng et al. 2022): the tokenizer, and the class token that has to know."""
import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.decoders.vqkd import UnitQuantizer, spherical_kmeans
from polysense.train.fit import fit
from polysense.train.starts import carry

recipe = polysense.load("beit_v2")
SMALL = {"width": 24, "depth": 2, "heads": 2}


def small(at):
    return {f"{at}.body.{k}": v for k, v in SMALL.items()}


CODEC = {**small("encoder"), "codes": 16, "width": 8}
TOY = {**small("config.encoder"), "config.aggregate.width": 24, "config.aggregate.heads": 2, "config.early": 1,
       **{f"config.target.codec.{k}": v for k, v in CODEC.items()}}
TOKENIZER = {**{f"config.codec.{k}": v for k, v in CODEC.items()}, **small("config.decoder"), "config.decoder.channels": 8,
             "config.teacher.tower.body.depth": 1, "config.teacher.tower.body.width": 48, "config.teacher.head.into": 48}


@pytest.fixture()
def image():
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture()
def beit():
    torch.manual_seed(0)
    system = preset_of("beit_v2").but(**TOY).config.build().eval()
    system.encoder.body.relative.table.data.normal_()
    return system


@pytest.fixture()
def vqkd():
    torch.manual_seed(0)
    return preset_of("beit_v2", "tiny_tokenizer").but(**TOKENIZER).config.build().eval()


# -- the quantizer ----------------------------------------------------------------------------------------------------------------------

def test_codes_are_nearest_by_cosine_and_lengths_do_not_count():
    book = UnitQuantizer.Config(codes=12, width=5).build()
    z = torch.randn(3, 7, 5)
    got = book(z)
    slow = torch.stack([torch.stack([F.cosine_similarity(v, book.codebook).argmax() for v in row]) for row in z])
    assert torch.equal(got.ids, slow) and torch.equal(book(z * 9).ids, slow)
    torch.testing.assert_close(got.vectors, book.codebook[slow])
    torch.testing.assert_close(got.passed, got.vectors)


def test_the_gradient_passes_the_choice_unchanged_and_the_codebook_has_none():
    book = UnitQuantizer.Config(codes=12, width=5).build()
    unit = F.normalize(torch.randn(7, 5), dim=-1)
    weight = torch.randn(7, 5)
    one, two = unit.clone().requires_grad_(), unit.clone().requires_grad_()
    (book(one).passed * weight).sum().backward()
    (F.normalize(two, dim=-1) * weight).sum().backward()
    torch.testing.assert_close(one.grad, two.grad)
    assert not list(book.parameters()) and not book.codebook.requires_grad


def test_codes_follow_what_chose_them_stay_of_length_one_and_the_others_stay():
    book = UnitQuantizer.Config(codes=6, width=4, decay=0.8).build()
    book.begun.fill_(1.0)
    before, z = book.codebook.clone(), torch.randn(50, 4)
    ids = torch.randint(0, 3, (50,))
    book.move(z, ids)
    torch.testing.assert_close(book.codebook.norm(dim=1), torch.ones(6))
    assert torch.equal(book.codebook[3:], before[3:])
    mean = F.normalize(F.normalize(z, dim=-1)[ids == 1].mean(0), dim=0)
    torch.testing.assert_close(book.codebook[1], F.normalize(0.8 * before[1] + 0.2 * mean, dim=0))
    still = UnitQuantizer.Config(codes=6, width=4, decay=1.0).build()
    still.begun.fill_(1.0)
    kept = still.codebook.clone()
    still.move(z, ids)
    torch.testing.assert_close(still.codebook, kept)
    with pytest.raises(UserError, match="make no codebook"):
        UnitQuantizer.Config(codes=6, width=4, decay=1.1).build()


def test_the_first_step_puts_codes_on_the_centres_of_the_data():
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(4, 16), dim=-1)
    z = F.normalize(centres.repeat(40, 1) + 0.02 * torch.randn(160, 16), dim=-1)
    book = UnitQuantizer.Config(codes=4, width=16).build()
    book.move(z, book(z).ids, 1)
    found = (centres @ book.codebook.T).amax(1)
    assert float(book.begun) == 1 and (found > 0.95).sum() >= 3, found
    assert spherical_kmeans(z[:2], 5, 0).shape == (5, 16), "more codes than vectors"


# -- the tokenizer ----------------------------------------------------------------------------------------------------------------------

def test_the_tokenizer_learns_to_say_what_the_teacher_says(vqkd, image):
    plan = preset_of("beit_v2", "tiny_tokenizer")
    teacher = {k: v.clone() for k, v in vqkd.teacher.state_dict().items()}
    steps = list(fit(vqkd, plan.stages[0].but(steps=25, **{"optim.warmup": 2}), iter([{"image": image}] * 25)))
    assert steps[-1].losses["features"] < steps[0].losses["features"] - 0.02
    assert all(torch.equal(v, teacher[k]) for k, v in vqkd.teacher.state_dict().items())
    said = [s.health for s in steps if s.health]
    assert said and all({"codes_used", "share_of_codes"} == h.keys() for h in said), "use of the codebook is watched"
    counts = torch.bincount(vqkd.encode_codes(image).flatten(), minlength=16).float()
    share = float(torch.distributions.Categorical(counts / counts.sum()).entropy().exp()) / 16
    assert float(vqkd.health(vqkd.losses({"image": image}).keep)["share_of_codes"]) == pytest.approx(share, rel=1e-4)
    assert vqkd.encode_codes(image).shape == (4, 8, 8) and vqkd.encode_codes(image).unique().numel() > 1
    quantized = vqkd.codec(image)[1]
    said = vqkd.widen(vqkd.decoder(quantized.vectors.permute(0, 3, 1, 2)).tokens[:, 1:])
    loss = 1 - F.cosine_similarity(said, vqkd.teacher.whole(image), dim=-1).mean()
    torch.testing.assert_close(vqkd.losses({"image": image})["features"], loss)
    assert (plan.config.teacher.tower_mean, plan.feed.image.mean) == ((0.48145466, 0.4578275, 0.40821073), (0.5, 0.5, 0.5))


def test_beit_stands_on_the_tokenizer_and_reads_its_codes_of_the_whole_picture(beit, vqkd, image):
    class Run:
        system = vqkd
    carry(preset_of("beit_v2").starts[0], Run(), beit)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (recipe.MEAN, recipe.STD))
    want = vqkd.encode_codes(((image * std + mean).clamp(0, 1) - 0.5) / 0.5).flatten(1)
    masking = beit.masking(image)
    assert torch.equal(beit.target(image, masking), want[masking.mask])


# -- the class token --------------------------------------------------------------------------------------------------------------------

def test_the_branch_has_the_last_class_token_and_early_patches_only(beit, image):
    masking, caught = beit.masking(image), []
    real = beit.encoder.body.layers

    def layers(*given, **more):
        out = real(*given, **more)
        out[-1].retain_grad()
        caught.append(out)
        return out
    beit.encoder.body.layers = layers
    main, branch = beit.said(image, masking)
    branch.square().sum().backward(retain_graph=True)
    last = caught[0][-1]
    assert torch.equal(last.grad[:, 1:], torch.zeros_like(last.grad[:, 1:])) and last.grad[:, 0].norm() > 0
    both = torch.cat([last[:, :1], caught[0][1][:, 1:]], 1)
    for block in beit.aggregate.blocks:
        both = block(both, mask=beit.encoder.body.relative(65))
    torch.testing.assert_close(branch, beit.decoder.head(beit.encoder.body.norm(both))[:, 1:][masking.mask])
    torch.testing.assert_close(main, beit.decoder.head(beit.encoder.body.norm(last))[:, 1:][masking.mask])


def test_both_branches_name_the_same_codes_through_one_head(beit, image):
    torch.manual_seed(3)
    masking = beit.masking(image)
    ids, (main, branch) = beit.target(image, masking), beit.said(image, masking)
    torch.manual_seed(3)
    got = beit.losses({"image": image})
    torch.testing.assert_close(got["codes"], F.cross_entropy(main, ids))
    torch.testing.assert_close(got["cls"], F.cross_entropy(branch, ids))
    hidden = masking.mask.view(-1, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(hidden, torch.randn_like(image), image)
    assert all(torch.equal(a, b) for a, b in zip(beit.said(image, masking), beit.said(other, masking)))


def test_it_learns_and_published_settings(beit, image):
    steps = list(fit(beit, preset_of("beit_v2").stages[0].but(steps=15, **{"optim.warmup": 1}), iter([{"image": image}] * 15)))
    assert steps[-1].total < steps[0].total
    paper, codec = preset_of("beit_v2", "paper").config, preset_of("beit_v2", "paper_tokenizer").config
    assert (paper.early, paper.aggregate.depth, paper.sampler.hidden, paper.encoder.pool) == (9, 2, 75, "cls") and paper.target.codec == codec.codec
    big = preset_of("beit_v2", "large").config
    assert (big.encoder.body.depth, big.encoder.width, big.early, big.aggregate.width, big.aggregate.block.layer_scale) == (24, 1024, 21, 1024, 1e-5)
    assert (codec.codec.codes, codec.codec.width, codec.codec.quantizer.decay, codec.decoder.body.depth, codec.decoder.image_size) == (
        8192, 32, 0.99, 3, 14)
