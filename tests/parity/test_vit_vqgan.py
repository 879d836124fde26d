"""ViT-VQGAN's released layout (enhancing-transformers): a file with its names and shapes, run by its own few lines, and back. Tolerance 1e-4."""
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.decoders.code_writer import CodeWriter
from polysense.decoders.style_critic import StyleCritic
from polysense.systems.generate import vit_vqgan
from polysense.weights.convert import export, import_
from polysense.weights.files import read_state

LAYOUT, P, N, Z, K = vit_vqgan.weights["enhancing"], 4, 4, 6, 20


def presets(name):
    look = vit_vqgan.Perceptual.Config(rows=vit_vqgan.vgg_rows((1,), base=4), seen=(0,))
    return preset_of("vit_vqgan", name).but(**{
        "config.prior": CodeWriter.Config(codes=K, side=N, body=vit_vqgan.body(8, 1, 1)), "config.perceptual": look,
        "config.critic": StyleCritic.Config(size=16, widths=(4, 4, 4))})


def released(width=128, depth=2, hidden=96):
    """Every tensor of such a file, random."""
    g = torch.Generator().manual_seed(0)

    def r(*shape):
        return torch.randn(*shape, generator=g) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.2)

    out = {"encoder.to_patch_embedding.0.weight": r(width, 3, P, P), "encoder.to_patch_embedding.0.bias": r(width),
           "decoder.to_pixel.1.weight": r(width, 3, P, P), "decoder.to_pixel.1.bias": r(3), "pre_quant.weight": r(Z, width), "pre_quant.bias": r(Z),
           "post_quant.weight": r(width, Z), "post_quant.bias": r(width), "quantizer.embedding.weight": r(K, Z)}
    for half, at in (("encoder", "en"), ("decoder", "de")):
        out |= {f"{half}.{at}_pos_embedding": r(1, N * N, width), f"{half}.transformer.norm.weight": 1 + r(width),
                f"{half}.transformer.norm.bias": r(width)}
        for i in range(depth):
            a = f"{half}.transformer.layers.{i}"
            out |= {f"{a}.0.fn.to_qkv.weight": r(3 * width, width), f"{a}.0.fn.to_out.weight": r(width, width), f"{a}.0.fn.to_out.bias": r(width),
                    f"{a}.1.fn.net.0.weight": r(hidden, width), f"{a}.1.fn.net.0.bias": r(hidden), f"{a}.1.fn.net.2.weight": r(width, hidden),
                    f"{a}.1.fn.net.2.bias": r(width)}
            out |= {f"{a}.{j}.norm.{p}": r(width) + (p == "weight") for j in (0, 1) for p in ("weight", "bias")}
    return out


def run(s, half, x, depth=2, heads=2):
    """One of its transformers: pre-norm, no bias in qkv, tanh in the MLP."""
    for i in range(depth):
        a = f"{half}.transformer.layers.{i}"
        y = F.layer_norm(x, x.shape[-1:], s[f"{a}.0.norm.weight"], s[f"{a}.0.norm.bias"])
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (y @ s[f"{a}.0.fn.to_qkv.weight"].T).chunk(3, -1))
        y = ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, s[f"{a}.0.fn.to_out.weight"], s[f"{a}.0.fn.to_out.bias"])
        y = F.layer_norm(x, x.shape[-1:], s[f"{a}.1.norm.weight"], s[f"{a}.1.norm.bias"])
        y = torch.tanh(F.linear(y, s[f"{a}.1.fn.net.0.weight"], s[f"{a}.1.fn.net.0.bias"]))
        x = x + F.linear(y, s[f"{a}.1.fn.net.2.weight"], s[f"{a}.1.fn.net.2.bias"])
    return F.layer_norm(x, x.shape[-1:], s[f"{half}.transformer.norm.weight"], s[f"{half}.transformer.norm.bias"])


@torch.no_grad()
def test_released_names_in_and_out(tmp_path):
    s = released()
    save_file(s, tmp_path / "vit.safetensors")
    ours, preset = import_(tmp_path / "vit.safetensors", LAYOUT, presets)
    ours.eval()
    assert preset.feed.image.size == P * N and preset.config.codec.encoder.body.heads == 2
    image = torch.rand(2, 3, 16, 16)                         # theirs lie in [0,1]
    x = F.conv2d(image, s["encoder.to_patch_embedding.0.weight"], s["encoder.to_patch_embedding.0.bias"], P).flatten(2).transpose(1, 2)
    z = F.linear(run(s, "encoder", x + s["encoder.en_pos_embedding"]), s["pre_quant.weight"], s["pre_quant.bias"])
    book = F.normalize(s["quantizer.embedding.weight"], dim=-1)
    ids = torch.cdist(F.normalize(z, dim=-1), book).argmin(-1)
    y = run(s, "decoder", F.linear(book[ids], s["post_quant.weight"], s["post_quant.bias"]) + s["decoder.de_pos_embedding"])
    out = F.conv_transpose2d(y.transpose(1, 2).unflatten(2, (N, N)), s["decoder.to_pixel.1.weight"], s["decoder.to_pixel.1.bias"], P)
    torch.testing.assert_close(ours.codec.encode(image * 2 - 1).flatten(1, 2), z, rtol=0, atol=1e-4)
    assert torch.equal(ours.encode_codes(image * 2 - 1).flatten(1), ids)
    torch.testing.assert_close(ours.reconstruct(image * 2 - 1) / 2 + 0.5, out, rtol=0, atol=1e-4)
    export(ours.state_dict(), preset.config, LAYOUT, tmp_path / "back.safetensors")
    back = read_state(tmp_path / "back.safetensors")
    assert back.keys() == s.keys()
    for k, v in s.items():
        torch.testing.assert_close(back[k], v, rtol=0, atol=1e-5)
    earlier = {k.replace("transformer.norm", "norm").replace("to_pixel.1", "to_pixel.conv_out"): v for k, v in s.items()}
    assert len(earlier.keys() - s.keys()) == 6
    save_file(earlier, tmp_path / "earlier.safetensors")
    twin = import_(tmp_path / "earlier.safetensors", LAYOUT, presets)[0].codec.state_dict()
    assert all(torch.equal(v, twin[k]) for k, v in ours.codec.state_dict().items())


def test_what_its_layout_cannot_hold_is_said(tmp_path):
    for name in ("tiny", "small"):
        with torch.device("meta"):
            system = preset_of("vit_vqgan", name).config.build()
        with pytest.raises(UserError, match="one linear"):
            export(system.state_dict(), preset_of("vit_vqgan", name).config, LAYOUT, tmp_path / "no.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not vit_vqgan"):
        import_(tmp_path / "x.safetensors", LAYOUT, presets)
