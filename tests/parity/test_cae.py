"""CAE under its authors' names, against the released forward pass written out on their tensors. Toy size, random weights, tolerance 1e-4."""
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.masking import masking_of
from polysense.systems.selfsup import cae
from polysense.weights.convert import export, import_

W, HEADS, GRID, CODES = 128, 2, 4, 40


def released() -> dict[str, torch.Tensor]:
    """Every name of a released file, random values."""
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = {"mask_token": torch.randn(1, 1, W) * 0.1}

    def linear(name, into, out, bias=True):
        state[f"{name}.weight"] = torch.randn(out, into) * into ** -0.5
        if bias:
            state[f"{name}.bias"] = torch.randn(out) * 0.1

    def norm(name):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + 0.1 * torch.randn(W), 0.1 * torch.randn(W)

    def block(at):
        norm(f"{at}.norm1"), norm(f"{at}.norm2")
        linear(f"{at}.attn.qkv", W, 3 * W, bias=False)
        linear(f"{at}.attn.proj", W, W), linear(f"{at}.mlp.fc1", W, 96), linear(f"{at}.mlp.fc2", 96, W)
        for n in ("attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2"):
            state[f"{at}.{n}"] = 0.3 + torch.randn(W) * 0.1

    for tower in ("encoder", "teacher"):
        state[f"{tower}.cls_token"], state[f"{tower}.pos_embed"] = torch.randn(1, 1, W), torch.cat([torch.zeros(1, 1, W), table()], 1)
        state[f"{tower}.patch_embed.proj.weight"], state[f"{tower}.patch_embed.proj.bias"] = torch.randn(W, 3, 8, 8) * 0.07, torch.randn(W)
        norm(f"{tower}.norm")
        for i in range(2):
            block(f"{tower}.blocks.{i}")
    for i in range(2):
        at = f"pretext_neck.regressor_blocks.{i}"
        for n in ("norm1_q", "norm1_k", "norm1_v", "norm2_cross"):
            norm(f"{at}.{n}")
        for n in "qkv":
            linear(f"{at}.cross_attn.{n}", W, W, bias=False)
        for n in ("cross_attn.q_bias", "cross_attn.v_bias", "gamma_1_cross", "gamma_2_cross"):
            state[f"{at}.{n}"] = 0.3 + torch.randn(W) * 0.1
        linear(f"{at}.cross_attn.proj", W, W), linear(f"{at}.mlp_cross.fc1", W, 96), linear(f"{at}.mlp_cross.fc2", 96, W)
        block(f"pretext_neck.decoder_blocks.{i}")
    norm("pretext_neck.norm"), norm("pretext_neck.norm2")
    linear("pretext_neck.head", W, CODES)
    return state


def table() -> torch.Tensor:
    """Row by row: sines and cosines of the row, then of the column."""
    speed = 10_000.0 ** -(torch.arange(W // 4) / (W // 4))
    rows = [torch.cat([f(torch.tensor(float(p)) * speed) for p in (r, c) for f in (torch.sin, torch.cos)]) for r in range(GRID) for c in range(GRID)]
    return torch.stack(rows)[None]


class Theirs:
    """The released model, sample by sample."""

    def __init__(self, state):
        self.s = state

    def norm(self, at, x):
        return F.layer_norm(x, (W,), self.s[f"{at}.weight"], self.s[f"{at}.bias"], 1e-6)

    def lin(self, at, x):
        return F.linear(x, self.s[f"{at}.weight"], self.s.get(f"{at}.bias"))

    def attend(self, q, k, v):
        heads = zip(*(a.split(64, -1) for a in (q, k, v)), strict=True)
        return torch.cat([((a @ b.T) / 8).softmax(-1) @ c for a, b, c in heads], -1)

    def block(self, at, x):
        y = self.norm(f"{at}.norm1", x)
        w = self.s[f"{at}.attn.qkv.weight"]
        q, k, v = y @ w[:W].T + self.s[f"{at}.attn.q_bias"], y @ w[W:2 * W].T, y @ w[2 * W:].T + self.s[f"{at}.attn.v_bias"]
        x = x + self.s[f"{at}.gamma_1"] * self.lin(f"{at}.attn.proj", self.attend(q, k, v))
        return x + self.s[f"{at}.gamma_2"] * self.lin(f"{at}.mlp.fc2", F.gelu(self.lin(f"{at}.mlp.fc1", self.norm(f"{at}.norm2", x))))

    def tower(self, at, image, rows):
        x = F.conv2d(image[None], self.s[f"{at}.patch_embed.proj.weight"], self.s[f"{at}.patch_embed.proj.bias"], stride=8)[0].flatten(1).T
        place = self.s[f"{at}.pos_embed"][0]
        x = torch.cat([self.s[f"{at}.cls_token"][0] + place[:1], (x + place[1:])[rows]])
        for i in range(2):
            x = self.block(f"{at}.blocks.{i}", x)
        return self.norm(f"{at}.norm", x)[1:]

    def __call__(self, image, mask):
        place = table()[0]
        here, there, seen = place[mask], place[~mask], self.tower("encoder", image, ~mask)
        x = self.s["mask_token"][0].expand(int(mask.sum()), -1)
        for i in range(2):
            at = f"pretext_neck.regressor_blocks.{i}"
            both = torch.cat([seen, x])
            q = self.lin(f"{at}.cross_attn.q", self.norm(f"{at}.norm1_q", x + here)) + self.s[f"{at}.cross_attn.q_bias"]
            k = self.lin(f"{at}.cross_attn.k", self.norm(f"{at}.norm1_k", both + torch.cat([there, here])))
            v = self.lin(f"{at}.cross_attn.v", self.norm(f"{at}.norm1_v", both)) + self.s[f"{at}.cross_attn.v_bias"]
            x = x + self.s[f"{at}.gamma_1_cross"] * self.lin(f"{at}.cross_attn.proj", self.attend(q, k, v))
            x = self.norm(f"{at}.norm2_cross", x)
            x = x + self.s[f"{at}.gamma_2_cross"] * self.lin(f"{at}.mlp_cross.fc2", F.gelu(self.lin(f"{at}.mlp_cross.fc1", x)))
        latent = self.norm("pretext_neck.norm", x)
        x = latent + here
        for i in range(2):
            x = self.block(f"pretext_neck.decoder_blocks.{i}", x)
        return self.lin("pretext_neck.head", self.norm("pretext_neck.norm2", x)), latent, self.tower("teacher", image, mask)


def presets(name):
    return preset_of("cae", name)


@torch.no_grad()
def test_released_names_in_and_out_and_the_whole_forward_pass(tmp_path):
    state = released()
    torch.save({"model": state}, tmp_path / "cae.pth")
    ours, preset = import_(tmp_path / "cae.pth", cae.weights["official"], presets)
    assert preset.config.encoder.body.heads == HEADS and preset.config.sampler.hidden == 8 and preset.config.target.truth.codec.encoder.codes == CODES
    image = torch.randn(2, 3, 32, 32)
    masking = masking_of(torch.rand(2, 16).argsort(1) < 8)
    said, latents = ours.eval().decoder(ours.see(image, masking), masking)
    aim, peer = ours.target.features(image, masking), Theirs(state)
    for b in range(2):
        logits, latent, target = peer(image[b], masking.mask[b])
        torch.testing.assert_close(said.view(2, 8, CODES)[b], logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(latents[b], latent, rtol=0, atol=1e-4)
        torch.testing.assert_close(aim[b], target, rtol=0, atol=1e-4)
    export(ours.state_dict(), preset.config, cae.weights["official"], tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in back.items())


def test_files_that_do_not_fit_are_refused_in_one_line():
    layout, state = cae.weights["official"], released()
    for wrong, says in ((state | {"encoder_to_decoder.weight": torch.zeros(4, 4)}, "narrower"),
                        ({k: v for k, v in state.items() if "gamma_1" not in k}, "layer scale"),
                        ({k: v for k, v in state.items() if "head" not in k}, "lacks pretext_neck.head")):
        with pytest.raises(UserError, match=says) as caught:
            layout.read({}, wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot hold"):
        layout.write(preset_of("cae").but(**{"config.encoder.position": "learned"}).config)
