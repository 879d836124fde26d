"""Probes' optimisers and pools against timm and transformers: LARS, the groups of layer decay, V-JEPA's attentive pooler. Tolerance 1e-4."""
import torch
from reference import reference, shake
from torch import nn

from polysense.base.system import Optim
from polysense.nn.attentive import AttentiveHead, JepaPool
from polysense.nn.head import LinearBias
from polysense.towers.headed import Headed
from polysense.towers.shapes import plain_vit
from polysense.train.optim import LARS, groups
from polysense.weights.vit_timm import keymap


def test_lars_steps_are_timms():
    reference("timm")
    from timm.optim import Lars

    torch.manual_seed(0)
    start, grads = torch.randn(5, 4), [torch.randn(5, 4) for _ in range(5)]
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = LARS([{"params": [mine]}], lr=6.4, momentum=0.9)
    peer = Lars([theirs], lr=6.4, momentum=0.9, weight_decay=0.0, trust_coeff=0.001, eps=0.0, always_adapt=True)
    for g in grads:
        mine.grad, theirs.grad = g.clone(), g.clone()
        ours.step()
        peer.step()
        assert float((mine - theirs).abs().max().detach()) < 1e-6
    assert not torch.equal(mine, start)


def test_groups_of_layer_decay_are_timms():
    reference("timm")
    from timm.models.vision_transformer import VisionTransformer
    from timm.optim import param_groups_layer_decay

    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=5)
    theirs = {}
    shapes = {id(p): n for n, p in model.named_parameters()}
    for group in param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.65):
        theirs |= {shapes[id(p)]: (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    ours = Headed.Config(backbone=plain_vit(32, 8, 24, 3, 2), head=LinearBias.Config(into=24, out=5)).build()
    table, checked = keymap(None), set()
    for group in groups(ours, Optim(lr=1.0, weight_decay=0.05, layer_decay=0.65)):
        for name in group["names"]:
            peer = table.theirs(name)
            last = peer.startswith("norm.")              # timm counts the final norm to the last block, BEiT's and MAE's code, as we do, to the head
            assert abs(theirs[peer][0] - (0.65 if last else group["lr"])) < 1e-9 and theirs[peer][1] == group["weight_decay"], name
            assert not last or group["lr"] == 1.0
            checked.add(peer)
    assert checked == set(theirs)


@torch.no_grad()
def test_pooling_is_transformers_v_jepa_with_and_without_self_attention():
    reference("transformers")
    from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2AttentivePooler, VJEPA2Config

    for depth in (0, 2):
        torch.manual_seed(depth)
        peer = VJEPA2AttentivePooler(VJEPA2Config(hidden_size=24, num_attention_heads=4, num_pooler_layers=depth,
                                                  attn_implementation="eager", layer_norm_eps=1e-5))
        shake(peer)
        ours = JepaPool.Config(width=24, heads=4, depth=depth).build().eval()
        names = {"query_tokens": "query", "cross_attention_layer.layer_norm1": "norm_k", "cross_attention_layer.layer_norm2": "norm_q",
                 "cross_attention_layer.mlp.fc1": "mlp.up", "cross_attention_layer.mlp.fc2": "mlp.down",
                 **{f"cross_attention_layer.cross_attn.{n}_proj": n for n in "qkv"}}
        for i in range(depth):
            a, b = f"self_attention_layers.{i}", f"body.blocks.{i}"
            names |= {f"{a}.layer_norm1": f"{b}.norm1", f"{a}.layer_norm2": f"{b}.norm2", f"{a}.mlp.fc1": f"{b}.mlp.up",
                      f"{a}.mlp.fc2": f"{b}.mlp.down", f"{a}.self_attn.out_proj": f"{b}.attn.out",
                      **{f"{a}.self_attn.{n}_proj": f"{b}.attn.{n}" for n in "qkv"}}
        state = {}
        for key, value in peer.state_dict().items():
            old = max((n for n in names if key.startswith(n)), key=len)
            state[names[old] + key[len(old):]] = value
        ours.load_state_dict(state)
        x = torch.randn(3, 10, 24)
        torch.testing.assert_close(ours(x), peer(x), rtol=0, atol=1e-4)
    head = AttentiveHead.Config(into=24, out=5, pool=JepaPool.Config(heads=4)).build().eval()
    assert head(torch.randn(3, 11, 24)).shape == (3, 5)
