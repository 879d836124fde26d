"""Mamba through transformers' files and back (CPU path). Random weights, toy sizes, tolerance 1e-4."""
import torch
import torch.nn.functional as F
from reference import reference, shake
from safetensors.torch import load_file, save_file

from polysense.base.catalogue import preset_of
from polysense.systems.backbone import mamba
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_


def theirs():
    hf = reference("transformers")
    torch.manual_seed(0)
    model = shake(hf.MambaForCausalLM(hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50, state_size=8, conv_kernel=4)))
    for name, p in model.named_parameters():
        if name.endswith("A_log"):
            p.data = torch.rand_like(p) * 2
    model.tie_weights()
    return hf, model


@torch.no_grad()
def test_transformers_in_and_out_logits_loss_and_both_states(tmp_path):
    hf, model = theirs()
    model.save_pretrained(tmp_path / "theirs")
    ours, preset = import_(tmp_path / "theirs", mamba.weights["hf"], lambda name: preset_of("mamba", name))
    text = torch.randint(1, 50, (2, 21))
    out = model(text, use_cache=True)
    hidden, states = ours.language.read(text)
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    want = {"logits": out.logits, "loss": loss}
    got = {"logits": ours.language.logits(hidden), "loss": ours.losses({"text": text})["language"]}
    for i, (conv, h) in enumerate(states):
        layer = out.cache_params.layers[i]
        kept = [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
        kept += [t for v in vars(layer).values() if isinstance(v, (list, tuple, dict)) for t in (v.values() if isinstance(v, dict) else v)
                 if isinstance(t, torch.Tensor)]
        ssm = next(t for t in kept if t.shape[-1] == 8 and t.ndim == 3)
        past = next(t for t in kept if t.shape[1] == 64 and t.ndim == 3 and t.shape[-1] in (3, 4))
        want |= {f"ssm {i}": ssm, f"conv {i}": past[..., -3:]}
        got |= {f"ssm {i}": h, f"conv {i}": conv}
    assert_agree(got, want)
    export(ours.state_dict(), preset.config, mamba.weights["hf"], tmp_path / "back", preset.feed)
    again = hf.MambaForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert_agree({"logits": again(text).logits}, {"logits": out.logits})


@torch.no_grad()
def test_the_authors_name_for_the_embedding(tmp_path):
    _, model = theirs()
    state = {k.replace("backbone.embeddings", "backbone.embedding"): v.clone() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    ours, _ = import_(tmp_path, mamba.weights["hf"], lambda name: preset_of("mamba", name))
    text = torch.randint(1, 50, (1, 9))
    assert_agree({"logits": ours.language.logits(ours.language(text).tokens)}, {"logits": model(text).logits})
    assert load_file(tmp_path / "model.safetensors").keys() == state.keys()


def test_published_shapes():
    hf = reference("transformers")
    with torch.device("meta"):
        state = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24)).state_dict()
        ours = preset_of("mamba", "paper").config.build().state_dict()
    config = preset_of("mamba", "paper").config
    assert {k: v.shape for k, v in mamba.weights["hf"].keymap(config).load(state).items()} == {k: v.shape for k, v in ours.items()}
    read = preset_of("mamba", "paper").but(**mamba.weights["hf"].read(mamba.weights["hf"].write(config), state)[1])
    assert read.config == config.but(**{"language.block.mixer.select.rank": 48})
