"""The discrete VAE against the released code (PyPI DALL-E 0.1) and transformers' FlavaImageCodebook: through files, both ways."""
import pytest
import torch
from reference import reference, shake
from safetensors.torch import save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.generate import dalle_dvae
from polysense.weights.convert import export, import_
from polysense.weights.files import read_state


def presets(name):
    return preset_of("dalle_dvae", name)


@pytest.fixture()
def image():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def released(width=64, codes=512):
    """OpenAI's own modules; their convolutions would run in half precision on a GPU, not here."""
    encoder, decoder = reference("dall_e.encoder"), reference("dall_e.decoder")
    pair = {"encoder": encoder.Encoder(n_hid=width, vocab_size=codes, n_blk_per_group=1),
            "decoder": decoder.Decoder(n_hid=width, vocab_size=codes, n_init=16, n_blk_per_group=1)}
    return {k: shake(v) for k, v in pair.items()}


@torch.no_grad()
def test_released_pair_in_and_out(tmp_path, image):
    theirs, utils = released(), reference("dall_e.utils")
    save_file({f"{half}.{k}": v for half, m in theirs.items() for k, v in m.state_dict().items()}, tmp_path / "dvae.safetensors")
    ours, preset = import_(tmp_path / "dvae.safetensors", dalle_dvae.weights["openai"], presets)
    logits = theirs["encoder"](utils.map_pixels(image))
    torch.testing.assert_close(ours.codec.logits(image), logits.permute(0, 2, 3, 1), rtol=0, atol=1e-4)
    ids = ours.encode_codes(image)
    assert torch.equal(ids, logits.argmax(1))
    out = theirs["decoder"](torch.nn.functional.one_hot(ids, 512).permute(0, 3, 1, 2).float())
    mu, log_b = ours.codec.spread(torch.nn.functional.one_hot(ids, 512).float())
    torch.testing.assert_close(torch.cat([mu, log_b], 1), out, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.decode_codes(ids), utils.unmap_pixels(torch.sigmoid(out[:, :3])), rtol=0, atol=1e-4)
    export(ours.state_dict(), preset.config, dalle_dvae.weights["openai"], tmp_path / "back.safetensors")
    back = read_state(tmp_path / "back.safetensors")
    for half, module in theirs.items():
        state = {k.removeprefix(f"{half}."): v for k, v in back.items() if k.startswith(half)}
        assert set(state) == set(module.state_dict()) and all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "image_codebook."])
def test_flavas_codebook_in_and_out(tmp_path, image, prefix):
    reference("transformers")
    flava = reference("transformers.models.flava.modeling_flava")
    config = reference("transformers").FlavaImageCodebookConfig(hidden_size=16, vocab_size=48, num_blocks_per_group=2, freeze=False)
    theirs = shake(flava.FlavaImageCodebook(config))
    save_file({prefix + k: v for k, v in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    ours, preset = import_(tmp_path, dalle_dvae.weights["flava"], presets)
    logits = theirs.blocks(0.8 * image + 0.1)
    torch.testing.assert_close(ours.codec.logits(image), logits.permute(0, 2, 3, 1), rtol=0, atol=1e-4)
    assert torch.equal(ours.encode_codes(image), theirs.get_codebook_indices(0.8 * image + 0.1))
    with pytest.raises(UserError, match="no decoder"):
        ours.reconstruct(image)
    export(ours.state_dict(), preset.config, dalle_dvae.weights["flava"], tmp_path / "back", preset.feed)
    again = flava.FlavaImageCodebook.from_pretrained(tmp_path / "back").eval()
    torch.testing.assert_close(again.blocks(0.8 * image + 0.1), logits, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="decoder"):
        export(ours.state_dict(), preset.config, dalle_dvae.weights["openai"], tmp_path / "no.safetensors")


def test_full_size_has_the_released_parameter_counts():
    with torch.device("meta"):
        ours = preset_of("dalle_dvae", "paper").config.build()
        theirs = reference("dall_e.encoder").Encoder(), reference("dall_e.decoder").Decoder()
    assert [sum(p.numel() for p in m.parameters()) for m in (ours.codec.encoder, ours.codec.decoder)] \
        == [sum(p.numel() for p in m.parameters()) for m in theirs]
