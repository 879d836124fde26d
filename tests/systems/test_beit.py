"""BEiT's essence (Bao et al. 2022)."""
from math import log

import numpy as np
import pytest
import torch
from fake import fake_batch
from PIL import Image

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.plan import AugmentPlan
from polysense.decoders.codes import shrink
from polysense.mechanisms.mask_sampler import BlockMask
from polysense.nn.masking import masking_of
from polysense.nn.relative import RelativeBias, offsets
from polysense.train.fit import fit
from polysense.train.starts import carry

recipe = polysense.load("beit")


def toy(**changes):
    plan = preset_of("beit").but(**{"config.encoder.body.width": 32, "config.encoder.body.depth": 2, "config.encoder.body.heads": 2,
                                    "config.target.codec.encoder.width": 8, "config.target.codec.decoder.width": 8})
    return plan.but(**changes)


@pytest.fixture()
def beit():
    torch.manual_seed(0)
    made = toy().config.build()
    made.encoder.body.relative.table.data.normal_()
    return made.eval()


@pytest.fixture(scope="module")
def image():
    return fake_batch(toy(), ("image",), n=3)["image"]


# -- two views of one crop --------------------------------------------------------------------------------------------------------------

def test_shrinking_is_pillows_lanczos():
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    want = np.asarray(Image.fromarray(picture).resize((16, 16), Image.Resampling.LANCZOS)).astype(float)
    got = shrink(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, 16)[0].permute(1, 2, 0) * 255
    assert np.abs(got.numpy() - want).max() < 1.5, "but for its rounding between the two axes"
    same = torch.rand(1, 3, 16, 16)
    assert shrink(same, 16) is same


def test_tokenizer_reads_the_same_unmasked_crop_at_half_the_side_with_its_own_normalisation(beit, image):
    seen = []
    beit.target.codec.encoder.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    masking = beit.masking(image)
    ids = beit.target(image, masking)
    assert seen[0].shape == (3, 3, 32, 32)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (recipe.MEAN, recipe.STD))
    torch.testing.assert_close(seen[0], (shrink((image * std + mean).clamp(0, 1), 32) - 0.5) / 0.5)
    assert torch.equal(ids, beit.target.ids(image).flatten(1)[masking.mask])
    paper = preset_of("beit", "paper").config.target
    assert paper.size == 112 and paper.codec.codes == 8192 and paper.codec_mean == (0.0, 0.0, 0.0), "DALL-E's tokenizer maps pixels itself"


def test_tokenizer_never_learns(beit, image):
    plan = toy()
    before = {k: v.clone() for k, v in beit.target.state_dict().items()}
    steps = list(fit(beit, plan.stages[0].but(steps=30, **{"optim.warmup": 0, "optim.lr": 5e-3}), iter([{"image": image}] * 30)))
    assert all(torch.equal(v, before[k]) for k, v in beit.target.state_dict().items())
    assert all(p.grad is None for p in beit.target.parameters())
    assert steps[-1].total < steps[0].total


# -- masking ----------------------------------------------------------------------------------------------------------------------------

def test_blocks_hide_the_count_asked_for_in_blocks_of_the_least_size():
    torch.manual_seed(0)
    sampler = preset_of("beit", "paper").config.sampler
    assert (sampler.hidden, sampler.least, sampler.aspect, sampler.fill, sampler.tries) == (75, 16, 0.3, "less", 10)
    counts = sampler.build()(200, (14, 14)).mask.sum(1)
    assert counts.max() <= 75 and (counts == 75).float().mean() > 0.3
    assert counts.float().mean() / 196 == pytest.approx(0.38, abs=0.02)
    # Only one block fits into what is asked for: its own area is at least `least`, but for the rounding of its sides.
    single = BlockMask.Config(hidden=17, least=16, tries=10).build()(100, (14, 14)).mask.view(-1, 14, 14)
    for mask in single:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert not mask.any() or mask.sum() >= 12
        if mask.sum() and mask.sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1):
            ratio = (rows.max() - rows.min() + 1) / (columns.max() - columns.min() + 1)
            assert 0.25 <= float(ratio) <= 4, "aspect in [0.3, 1/0.3], rounded"


def test_logits_do_not_depend_on_what_is_under_the_mask_and_masked_embeddings_are_the_token(beit, image):
    masking = beit.masking(image)
    other = image.clone().unfold(2, 8, 8).unfold(3, 8, 8)                        # B 3 h w 8 8
    other = torch.where(masking.mask.view(3, 1, 8, 8, 1, 1), torch.randn_like(other), other).permute(0, 1, 2, 4, 3, 5).reshape(image.shape)
    assert not torch.equal(other, image)
    assert torch.equal(beit.decoder(beit.see(image, masking), masking), beit.decoder(beit.see(other, masking), masking))
    x, _ = beit.encoder.embed(image, fill=(masking.mask, beit.hide.token))
    assert x.shape[1] == 65 and torch.equal(x[:, 1:][masking.mask], beit.hide.token[0].expand(int(masking.mask.sum()), -1))


def test_loss_is_the_mean_over_all_masked_positions_of_the_batch_and_begins_near_log_k(beit, image):
    torch.manual_seed(5)
    masking = beit.masking(image)
    logits, ids = beit.decoder.whole(beit.see(image, masking)).log_softmax(-1), beit.target.ids(image).flatten(1)
    total = [-float(logits[b, n, ids[b, n]]) for b in range(3) for n in range(64) if masking.mask[b, n]]
    torch.manual_seed(5)
    assert beit.losses({"image": image})["codes"].item() == pytest.approx(sum(total) / len(total), rel=1e-4)
    fresh = toy().config.build()
    assert fresh.losses({"image": image})["codes"].item() == pytest.approx(log(64), abs=0.1)


# -- the tower --------------------------------------------------------------------------------------------------------------------------

def test_offsets_are_those_of_a_loop_with_three_extra_rows():
    index = offsets((2, 3))
    for i in range(6):
        for j in range(6):
            (r, c), (s, d) = divmod(i, 3), divmod(j, 3)
            assert index[1 + i, 1 + j] == (r - s + 1) * 5 + (c - d + 2)
    assert index[0, 1:].unique().tolist() == [15] and index[1:, 0].unique().tolist() == [16] and index[0, 0] == 17
    assert RelativeBias.Config(grid=(2, 3), heads=4).build().table.shape == (18, 4)


def test_one_table_for_all_layers_and_copies_for_each_change_nothing(beit, image):
    names = [n for n, _ in beit.encoder.named_parameters() if "table" in n]
    assert names == ["body.relative.table"] and beit.encoder.position is None
    tuned = recipe.finer(toy().config.encoder, 0.0).build().eval()
    tuned.load_state_dict(tuned.take_over(beit.encoder.state_dict()))
    assert len([n for n, _ in tuned.named_parameters() if "table" in n]) == 2
    torch.testing.assert_close(tuned(image).tokens, beit.encoder.body.layers(beit.encoder.embed(image)[0])[-1], rtol=1e-5, atol=1e-5)


def test_fine_tuning_stands_on_the_pretrained_tower(beit, image):
    plan = recipe.classifier(toy(), 5, "tiny", 0.0, preset_of("beit").feed.train_image, preset_of("beit", "tiny_finetune").stages[0])
    tuned = plan.config.build()
    carry(plan.starts[0], _run(beit), tuned)
    table = beit.encoder.body.relative.table
    assert all(torch.equal(b.attn.relative.table, table) for b in tuned.backbone.body.blocks)
    tuned.eval()
    mean = tuned.backbone(image).tokens[:, 1:].mean(1)
    torch.testing.assert_close(tuned.classify(image), tuned.head.out(tuned.head.norm(mean)))
    batch = {"image": image, "label": torch.tensor([0, 1, 2])}
    steps = list(fit(tuned, plan.stages[0].but(steps=8, **{"optim.warmup": 0}), iter([batch] * 8)))
    assert steps[-1].total < steps[0].total and preset_of("beit", "finetune").stages[0].optim.layer_decay < 1


class _run:
    """As much of a run as a Start reads."""

    def __init__(self, system):
        self.system = system


def test_positions_are_known_through_the_biases_alone(beit, image):
    for block in beit.encoder.body.blocks:
        block.scale1.data.fill_(10.0)                # or what attention adds is small at birth
    swapped = torch.cat([image[..., 32:], image[..., :32]], -1)
    tokens = lambda x: beit.encoder(x).tokens[:, 1:].unflatten(1, (8, 8))
    moved = tokens(swapped)
    assert not torch.allclose(torch.cat([moved[:, :, 4:], moved[:, :, :4]], 2), tokens(image), atol=1e-2)
    beit.encoder.body.relative.table.data.zero_()
    moved = tokens(swapped)
    torch.testing.assert_close(torch.cat([moved[:, :, 4:], moved[:, :, :4]], 2), tokens(image), rtol=1e-3, atol=1e-3)


def test_biases_scales_and_first_weights_are_the_papers():
    torch.manual_seed(0)
    body = preset_of("beit", "paper").config.encoder.body.but(width=96, heads=3, depth=3).build()
    attn = body.blocks[0].attn
    assert attn.q.bias is not None and attn.v.bias is not None and attn.k.bias is None
    assert body.blocks[0].scale1.unique().tolist() == pytest.approx([0.1])
    for i, block in enumerate(body.blocks):
        for linear in (block.attn.out, block.mlp.down):
            assert linear.weight.std().item() == pytest.approx(0.88 * 0.02 / (2 * (i + 1)) ** 0.5, rel=0.1)
        assert block.attn.q.weight.std().item() == pytest.approx(0.88 * 0.02, rel=0.1)


def test_another_size_is_read_with_an_interpolated_table(beit):
    assert beit.encode_image(torch.randn(1, 3, 96, 96)).shape == (1, 32)
    with pytest.raises(UserError, match="square"):
        beit.encode_image(torch.randn(1, 3, 64, 128))


def test_what_does_not_fit_is_refused(beit):
    with pytest.raises(UserError, match="codec"):
        beit.losses({"image": torch.randn(1, 3, 96, 96)})
    with pytest.raises(UserError, match="sides"):
        beit.target.codec.ids(torch.randn(1, 3, 30, 30))
    with pytest.raises(UserError):
        masked = masking_of(torch.zeros(1, 16, dtype=torch.bool))
        beit.target(torch.randn(1, 3, 64, 64), masked)


def test_paper_jitters_every_picture_and_reads_pixels_from_minus_one_to_one():
    paper = preset_of("beit", "paper")
    assert (paper.feed.train_image.jitter, paper.feed.train_image.jitter_by) == (1.0, (0.4, 0.4, 0.4, 0.0))
    for name in ("paper", "finetune"):
        image = preset_of("beit", name).feed.image
        assert image.mean == image.std == (0.5, 0.5, 0.5)
    assert (paper.config.target.mean, paper.config.target.std) == (paper.feed.image.mean, paper.feed.image.std)
    tuned = preset_of("beit", "finetune").feed.train_image
    assert isinstance(tuned, AugmentPlan) and (tuned.operations, tuned.magnitude, tuned.erase) == (2, 9.0, 0.25)
