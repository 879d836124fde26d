"""MAE-ST under its authors' names against the released forward pass, written out; one frame of it against transformers' MAE. Tolerance 1e-4."""
import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import load_file

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.masking import masking_by
from polysense.objectives.masked import masked_mse
from polysense.systems.selfsup import mae_st
from polysense.weights import mae_hf
from polysense.weights.convert import export, import_

W, D, T, S, P = 64, 32, 4, 4, 8                      # widths of encoder and decoder, times, side of the grid, patch


def released(joint: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def linear(name, into, out):
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(out, into) * into ** -0.5, torch.randn(out) * 0.1

    def norm(name, width):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + 0.1 * torch.randn(width), 0.1 * torch.randn(width)

    def block(at, width):
        norm(f"{at}.norm1", width), norm(f"{at}.norm2", width)
        for n in ("qkv",) if joint else "qkv":
            linear(f"{at}.attn.{n}", width, 3 * width if joint else width)
        linear(f"{at}.attn.proj", width, width), linear(f"{at}.mlp.fc1", width, 96), linear(f"{at}.mlp.fc2", 96, width)

    state["cls_token"] = torch.randn(1, 1, W)
    state["patch_embed.proj.weight"], state["patch_embed.proj.bias"] = torch.randn(W, 3, 2, P, P) * 0.05, torch.randn(W)
    for name, n in (("spatial", S * S), ("temporal", T), ("class", 1)):
        state[f"pos_embed_{name}"] = torch.randn(1, n, W)
    norm("norm", W)
    for i in range(2):
        block(f"blocks.{i}", W)
    if joint:
        state |= {"mask_token": torch.zeros(1, 1, D), "decoder_pos_embed": torch.zeros(1, 65, D),
                  "pred_head.transforms.0.0.norm1.weight": torch.ones(D)}
        linear("decoder_embed", W, D), linear("pred_head.projections.0", D, P * P * 3)
        return state
    state["decoder_cls_token"], state["mask_token"] = torch.randn(1, 1, D), torch.randn(1, 1, D)
    for name, n in (("spatial", S * S), ("temporal", T), ("class", 1)):
        state[f"decoder_pos_embed_{name}"] = torch.randn(1, n, D)
    linear("decoder_embed", W, D), linear("decoder_pred", D, P * P * 3), norm("decoder_norm", D)
    block("decoder_blocks.0", D)
    return state


class Theirs:
    """The released model of one clip [3,T,H,W]: nothing of this house in it."""

    def __init__(self, state):
        self.s = state

    def lin(self, at, x):
        return F.linear(x, self.s[f"{at}.weight"], self.s[f"{at}.bias"])

    def norm(self, at, x):
        return F.layer_norm(x, x.shape[-1:], self.s[f"{at}.weight"], self.s[f"{at}.bias"], 1e-6)

    def block(self, at, x, each):
        y = self.norm(f"{at}.norm1", x)
        q, k, v = self.lin(f"{at}.attn.qkv", y).chunk(3, -1) if f"{at}.attn.qkv.weight" in self.s else (self.lin(f"{at}.attn.{n}", y) for n in "qkv")
        heads = [((a @ b.T) * each ** -0.5).softmax(-1) @ c for a, b, c in zip(*(z.split(each, -1) for z in (q, k, v)), strict=True)]
        x = x + self.lin(f"{at}.attn.proj", torch.cat(heads, -1))
        return x + self.lin(f"{at}.mlp.fc2", F.gelu(self.lin(f"{at}.mlp.fc1", self.norm(f"{at}.norm2", x))))

    def place(self, prefix):
        space, time = self.s[f"{prefix}pos_embed_spatial"][0], self.s[f"{prefix}pos_embed_temporal"][0]
        return torch.stack([space[n] + time[t] for t in range(T) for n in range(S * S)])

    def encode(self, clip, keep):
        x = F.conv3d(clip[None], self.s["patch_embed.proj.weight"], self.s["patch_embed.proj.bias"], stride=(2, P, P))[0].flatten(1).T
        x = torch.cat([self.s["cls_token"][0] + self.s["pos_embed_class"][0], (x + self.place(""))[keep]])
        for i in range(2):
            x = self.block(f"blocks.{i}", x, 64)
        return self.norm("norm", x)

    def __call__(self, clip, mask, keep):
        x = torch.empty(T * S * S, D)
        x[keep] = self.lin("decoder_embed", self.encode(clip, keep)[1:])
        x[mask] = self.s["mask_token"][0]
        x = torch.cat([self.s["decoder_cls_token"][0] + self.s["decoder_pos_embed_class"][0], x + self.place("decoder_")])
        said = self.lin("decoder_pred", self.norm("decoder_norm", self.block("decoder_blocks.0", x, 32)))[1:]
        frames = clip[:, torch.linspace(0, 2 * T - 1, T).long()]
        want = torch.stack([frames[:, t, y * P:y * P + P, x0 * P:x0 * P + P].permute(1, 2, 0).flatten()
                            for t in range(T) for y in range(S) for x0 in range(S)])
        want = (want - want.mean(1, keepdim=True)) / (want.var(1, keepdim=True) + 1e-6) ** 0.5
        return said, (said - want).square().mean(1)[mask].mean()


def presets(name):
    return preset_of("mae_st", name)


@torch.no_grad()
def test_released_names_in_and_out_and_the_whole_forward_pass(tmp_path):
    state = released()
    torch.save({"model": state}, tmp_path / "mae_st.pth")
    ours, preset = import_(tmp_path / "mae_st.pth", mae_st.weights["official"], presets)
    assert (preset.config.encoder.frames, preset.config.target.said, preset.config.target.frames) == (8, 4, 1) and preset.feed.video.view.size == 32
    video = torch.randn(2, 8, 3, 32, 32)
    masking = masking_by(torch.rand(2, 64), 6)
    seen, peer = ours.eval().see(video, masking), Theirs(state)
    said, losses = ours.decoder.whole(seen, masking), []
    for b in range(2):
        want, loss = peer(video[b].transpose(0, 1), masking.mask[b], masking.keep[b])
        torch.testing.assert_close(seen[b], peer.encode(video[b].transpose(0, 1), masking.keep[b]), rtol=0, atol=1e-4)
        torch.testing.assert_close(said[b], want, rtol=0, atol=1e-4)
        losses.append(loss)
    torch.testing.assert_close(masked_mse(*ours.pairs(video, masking)), torch.stack(losses).mean(), rtol=0, atol=1e-4)
    export(ours.state_dict(), preset.config, mae_st.weights["official"], tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in back.items())


@torch.no_grad()
def test_encoders_of_slowfast_in_and_out(tmp_path):
    state = released(joint=True)
    torch.save({"model_state": state}, tmp_path / "mae_st.pyth")
    ours, preset = import_(tmp_path / "mae_st.pyth", mae_st.weights["slowfast"], presets)
    clip = torch.randn(3, 8, 32, 32)
    torch.testing.assert_close(ours.eval().encoder(clip.transpose(0, 1)[None]).tokens[0], Theirs(state).encode(clip, slice(None)), rtol=0, atol=1e-4)
    export(ours.state_dict(), preset.config, mae_st.weights["slowfast"], tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert {k for k in state if not k.startswith(("dec", "pred_head", "mask_token"))} == set(back)
    assert all(torch.equal(v, state[k]) for k, v in back.items())


@torch.no_grad()
def test_one_frame_of_it_is_transformers_mae():
    """A cube of one frame, one frame, positions of space alone; the decoder's class token is what transformers' decoder reads of the encoder's."""
    hf = reference("transformers")
    peer = shake(hf.ViTMAEForPreTraining(hf.ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96, decoder_hidden_size=32,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=1, decoder_intermediate_size=96, norm_pix_loss=True, layer_norm_eps=1e-6)))
    base = preset_of("mae_st", "paper").but(**{
        "config.encoder.frames": 1, "config.encoder.tubelet": 1, "config.encoder.image_size": 32, "config.encoder.patch": 8, "config.target.patch": 8,
        "config.target.said": 1, "config.encoder.body": mae_st.tower(64, 2, 1), "config.decoder.body": mae_st.tower(32, 1, 1)}).but(**{
            f"config.{p}.body.block.mlp.hidden": 96 for p in ("encoder", "decoder")})
    ours, theirs = base.config.build().eval(), peer.state_dict()
    mine = {k: v for k, v in mae_hf.keymap(preset_of("mae", "vit_b_16").config).load(theirs).items() if not k.endswith("position")}
    mine["encoder.patch.weight"] = mine["encoder.patch.weight"][:, :, None]
    for part, name in (("encoder", "vit.embeddings.position_embeddings"), ("decoder", "decoder.decoder_pos_embed")):
        mine |= {f"{part}.place.space": theirs[name][:, 1:], f"{part}.place.first": theirs[name][:, :1],
                 f"{part}.place.time": torch.zeros(1, 1, theirs[name].shape[2])}
    image, noise = torch.randn(1, 3, 32, 32), torch.rand(1, 16)
    out = peer(image, noise=noise)
    first = peer.vit(image, noise=noise).last_hidden_state[:, :1]
    mine["decoder.cls"] = F.linear(first, mine["decoder.embed.weight"], mine["decoder.embed.bias"])
    ours.load_state_dict(mine)
    masking = masking_by(noise, 4)
    seen = ours.see(image[:, None], masking)
    torch.testing.assert_close(seen, peer.vit(image, noise=noise).last_hidden_state, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.decoder.whole(seen, masking), out.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(masked_mse(*ours.pairs(image[:, None], masking)), out.loss, rtol=0, atol=1e-4)


def test_files_that_do_not_fit_are_refused_in_one_line():
    layout, state = mae_st.weights["official"], released()
    for wrong, says in (({k: v for k, v in state.items() if k != "pos_embed_class"}, "no class token"),
                        (state | {"decoder_pred.weight": torch.zeros(100, D)}, "predicts 100 numbers"),
                        ({k: v for k, v in state.items() if "decoder_embed" not in k}, "lacks decoder_embed")):
        with pytest.raises(UserError, match=says) as caught:
            layout.read({}, wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot hold"):
        layout.write(preset_of("mae_st").but(**{"config.encoder.prefix": 0}).config)
