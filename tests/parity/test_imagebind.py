"""ImageBind's released layout at toy size, both ways: a stand-in of the same names made of torch's own layers; frozen towers against open_clip."""
import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import load_file
from torch import nn

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.norm import LayerNorm
from polysense.weights import clip_openai
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

recipe = polysense.load("imagebind")
LAYOUT = recipe.weights["official"]
HEADS = {"vision": 16, "text": 16, "audio": 12, "depth": 8, "thermal": 12, "imu": 8}
WIDTH = {"vision": 32, "text": 32, "audio": 24, "depth": 16, "thermal": 24, "imu": 16}
DIM, VOCAB, LENGTH = 20, 50, 10


class Block(nn.Module):
    def __init__(self, width: int, heads: int, extra: bool):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, add_bias_kv=extra, batch_first=True)
        self.norm_1, self.norm_2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x, mask=None):
        y = self.norm_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm_2(x))))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


class StandIn(nn.Module):
    """The released module tree."""

    def __init__(self):
        super().__init__()
        front, trunk, head, after = (nn.ModuleDict() for _ in range(4))
        for name, width in WIDTH.items():
            front[name], trunk[name] = nn.Module(), nn.Module()
            trunk[name].blocks = nn.ModuleList(Block(width, HEADS[name], name not in ("vision", "text")) for _ in range(2))
        tokens = {"vision": 1 + 4, "audio": 1 + 12 * 19, "depth": 1 + 4, "thermal": 1 + 4, "imu": 1 + 250}
        for name, count in tokens.items():
            front[name].cls_token = parameter(1, 1, WIDTH[name])
            if name == "imu":
                front[name].pos_embed = parameter(1, count, WIDTH[name])
            else:
                front[name].pos_embedding_helper = nn.Module()
                front[name].pos_embedding_helper.pos_embed = parameter(1, count, WIDTH[name])
            head[name] = nn.Sequential(nn.LayerNorm(WIDTH[name], eps=1e-6), nn.Identity(), *([nn.Dropout(0.5)] if name == "imu" else []),
                                       nn.Linear(WIDTH[name], DIM, bias=False))
        trunk["vision"].pre_transformer_layer = nn.Sequential(nn.LayerNorm(32, eps=1e-6), nn.Identity())
        stems = {"vision": nn.Sequential(nn.Identity(), nn.Conv3d(3, 32, (2, 8, 8), (2, 8, 8), bias=False)),
                 "audio": nn.Conv2d(1, 24, 16, 10, bias=False),
                 "depth": nn.Conv2d(1, 16, 16, 16, bias=False), "thermal": nn.Conv2d(1, 24, 16, 16, bias=False), "imu": nn.Linear(48, 16, bias=False)}
        for name, proj in stems.items():
            stem = nn.Module()
            stem.proj = proj
            if name != "vision":
                stem.norm_layer = nn.LayerNorm(WIDTH[name])
            setattr(front[name], {"depth": "depth_stem", "imu": "imu_stem"}.get(name, "rgbt_stem"), stem)
        front["text"].token_embedding, front["text"].pos_embed = nn.Embedding(VOCAB, 32), parameter(1, LENGTH, 32)
        front["text"].register_buffer("mask", torch.full((LENGTH, LENGTH), float("-inf")).triu_(1))
        head["text"] = nn.Module()
        head["text"].proj = nn.Sequential(nn.LayerNorm(32, eps=1e-6), nn.Linear(32, DIM, bias=False))
        for name, scale in (("text", 1 / 0.07), ("audio", 20.0), ("depth", 5.0), ("thermal", 10.0), ("imu", 5.0)):
            after[name] = nn.Sequential(nn.Identity(), nn.Module())
            after[name][1].register_buffer("log_logit_scale", torch.tensor(scale).log())
        self.modality_preprocessors, self.modality_trunks, self.modality_heads, self.modality_postprocessors = front, trunk, head, after

    def encode(self, name: str, x: torch.Tensor) -> torch.Tensor:
        front, trunk, head = (getattr(self, f"modality_{p}")[name] for p in ("preprocessors", "trunks", "heads"))
        mask = None
        if name == "text":
            ends, mask = x.argmax(1), front.mask
            x = front.token_embedding(x) + front.pos_embed
        else:
            if name == "vision":
                x = front.rgbt_stem.proj[1](x[:, :, None].repeat(1, 1, 2, 1, 1)).flatten(2).transpose(1, 2)
            elif name == "imu":
                x = x.unfold(-1, 8, 8).permute(0, 2, 1, 3)
                x = front.imu_stem.norm_layer(front.imu_stem.proj(x.reshape(*x.shape[:2], -1)))
            else:
                stem = front.depth_stem if name == "depth" else front.rgbt_stem
                x = stem.norm_layer(stem.proj(x).flatten(2).transpose(1, 2))
            position = front.pos_embed if name == "imu" else front.pos_embedding_helper.pos_embed
            x = torch.cat([front.cls_token.expand(len(x), -1, -1), x], 1) + position
        x = trunk.pre_transformer_layer[0](x) if name == "vision" else x
        for block in trunk.blocks:
            x = block(x, mask)
        if name == "text":
            return F.normalize(head.proj(x[torch.arange(len(x)), ends]), dim=-1) * self.modality_postprocessors["text"][1].log_logit_scale.exp()
        x = F.normalize(head[-1](head[0](x)[:, 0]), dim=-1)
        return x if name == "vision" else x * self.modality_postprocessors[name][1].log_logit_scale.exp()


@torch.no_grad()
def test_the_released_layout_in_and_out(tmp_path):
    torch.manual_seed(0)
    theirs = StandIn()
    fixed = {k: v.clone() for k, v in theirs.state_dict().items() if "log_logit_scale" in k or k.endswith("text.mask")}
    shake(theirs).load_state_dict(fixed, strict=False)
    torch.save(theirs.state_dict(), tmp_path / "imagebind_huge.pth")
    ours, preset = import_(tmp_path / "imagebind_huge.pth", LAYOUT, lambda name: preset_of("imagebind", name))
    assert preset.feed.image.size == 16 and preset.config.depth.tower.tokens.size == (32, 32)
    text = torch.randint(3, 40, (3, LENGTH))
    text[:, 6] = VOCAB - 1
    sound = 0.1 * torch.randn(3, 32000)
    given = {"image": torch.randn(3, 3, 16, 16), "text": text, "audio": sound, "depth": torch.rand(3, 1, 32, 32),
             "thermal": torch.rand(3, 1, 32, 32), "imu": torch.randn(3, 6, 2000)}
    theirs_reads = given | {"audio": ours.audio.tower.front(sound)}
    want = {n: theirs.encode("vision" if n == "image" else n, x) for n, x in theirs_reads.items()}
    assert_agree(ours.scaled(given), want)
    place = export(ours.state_dict(), preset.config, LAYOUT, tmp_path / "back", preset.feed)
    file = next(place.iterdir())
    state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    before = theirs.state_dict()
    assert set(before) - set(state) == {"modality_preprocessors.text.mask"} and all(torch.equal(state[k], before[k]) for k in state)


def test_incomplete_and_other_files_are_refused(tmp_path):
    state = {k: v for k, v in StandIn().state_dict().items() if ".imu." not in k}
    torch.save(state, tmp_path / "imagebind_huge.pth")
    with pytest.raises(UserError, match="imu"):
        import_(tmp_path / "imagebind_huge.pth", LAYOUT, lambda name: preset_of("imagebind", name))
    with pytest.raises(UserError, match="binds no depth"):
        LAYOUT.write(preset_of("imagebind").config)


@torch.no_grad()
def test_frozen_towers_are_open_clips():
    open_clip = reference("open_clip.transformer")
    theirs = shake(open_clip.VisionTransformer(image_size=16, patch_size=8, width=32, layers=2, heads=4, mlp_ratio=4, output_dim=DIM))
    towers = recipe.clip(16, 8, recipe.clip_body(32, 2, 4, act="gelu"), recipe.clip_body(32, 2, 4, act="gelu"), DIM, LayerNorm.Config(),
                         vocab=VOCAB, length=LENGTH)
    ours = recipe.ImageBind.Config(**towers).build().eval()
    state = clip_openai.VIT.load({k: v for k, v in theirs.state_dict().items() if k != "proj"})
    state["patch.weight"] = ours.vision.patch.adapt("weight", state["patch.weight"])
    ours.vision.load_state_dict(state)
    ours.image_head.weight.copy_(theirs.proj.T)
    image = torch.randn(3, 3, 16, 16)
    assert_agree({"image": ours.encode_image(image)}, {"image": F.normalize(theirs(image), dim=-1)})
    words = shake(open_clip.TextTransformer(context_length=LENGTH, vocab_size=VOCAB, width=32, layers=2, heads=4, output_dim=DIM))
    words.attn_mask.copy_(torch.full((LENGTH, LENGTH), float("-inf")).triu_(1))
    ours.text.load_state_dict(clip_openai.TEXT.load({k: v for k, v in words.state_dict().items() if k != "text_projection"}))
    ours.text_head.weight.copy_(words.text_projection.T)
    text = torch.randint(3, 40, (3, LENGTH))
    text[:, 7] = VOCAB - 1
    assert_agree({"text": ours.encode_text(text)}, {"text": F.normalize(words(text), dim=-1)})
