"""CoOp's released prompt learners beside an OpenAI CLIP, both ways, against transformers' CLIP and the authors' way of putting a prompt together."""
import pytest
import torch
from reference import reference, shake

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.systems.align import clip, coop
from polysense.weights.convert import compare as assert_agree
from polysense.weights.convert import export, import_

VOCAB, LENGTH, WIDTH, DIM = 90, 20, 64, 24


def presets(name: str):
    return preset_of("coop", name)


@pytest.fixture(scope="module")
def theirs():
    """transformers' CLIP, and the same weights in OpenAI's file."""
    transformers = reference("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_act": "quick_gelu", "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 1, "num_hidden_layers": 2}
    config = transformers.CLIPConfig(text_config={**sizes, "vocab_size": VOCAB, "max_position_embeddings": LENGTH, "eos_token_id": 2},
                                     vision_config={**sizes, "image_size": 32, "patch_size": 16}, projection_dim=DIM)
    model = shake(transformers.CLIPModel(config))
    preset = preset_of("clip", "vit_b_32").but(config=clip.config(32, 16, clip.body(WIDTH, 2, 1), clip.body(WIDTH, 2, 1), DIM, VOCAB, LENGTH))
    return model, preset


@pytest.fixture(scope="module")
def released(theirs, tmp_path_factory):
    """A folder as the authors' code leaves it: OpenAI's archive and a prompt learner of four vectors, begun as words."""
    model, preset = theirs
    folder = tmp_path_factory.mktemp("coop")
    ours = preset.config.build()
    state = clip.weights["hf"].keymap(preset.config).load({k: v for k, v in model.state_dict().items() if "position_ids" not in k})
    ours.load_state_dict(state)
    export(ours.state_dict(), preset.config, clip.weights["openai"], folder / "ViT-B-32.pt")
    table = model.text_model.embeddings.token_embedding.weight
    learner = {"ctx": table[[20, 21, 22, 23]].clone(), "token_prefix": torch.randn(3, 1, WIDTH), "token_suffix": torch.randn(3, LENGTH - 5, WIDTH)}
    torch.save({"state_dict": learner, "epoch": 50}, folder / "model.pth.tar")
    return folder


def names() -> torch.Tensor:
    return torch.tensor([[1, 11, 9, VOCAB - 1, 0], [1, 12, 13, 9, VOCAB - 1], [1, 14, 9, VOCAB - 1, 0]])


@torch.no_grad()
def test_with_words_as_context_it_is_transformers_clip_with_that_template(theirs, released):
    model, _ = theirs
    ours, _ = import_(released / "model.pth.tar", coop.weights["official"], presets)
    written = torch.cat([names()[:, :1], torch.tensor([[20, 21, 22, 23]] * 3), names()[:, 1:]], 1)
    image = torch.randn(3, 3, 32, 32)
    said = model(input_ids=written, pixel_values=image)
    ours.text.meet(names())
    assert_agree({"text": ours.encode_text(names()), "logits": ours.classify(image)}, {"text": said.text_embeds, "logits": said.logits_per_image})


@torch.no_grad()
def test_learned_vectors_as_the_authors_code_puts_them_together(theirs, released, tmp_path):
    """Embeddings of prefix, context and suffix, then positions, transformer, norm and projection, in plain torch."""
    model, _ = theirs
    text, ctx = model.text_model, torch.randn(4, WIDTH)
    torch.save({"state_dict": {"prompt_learner.ctx": ctx}}, tmp_path / "prompt_learner.pt")
    (tmp_path / "ViT-B-32.pt").write_bytes((released / "ViT-B-32.pt").read_bytes())
    ours, preset = import_(tmp_path / "prompt_learner.pt", coop.weights["official"], presets)
    words = text.embeddings.token_embedding(names())
    x = torch.cat([words[:, :1], ctx.expand(3, -1, -1), words[:, 1:]], 1)
    x = x + text.embeddings.position_embedding.weight[:x.shape[1]]
    causal = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
    for layer in text.encoder.layers:
        out = layer(x, attention_mask=causal[None, None])
        x = out[0] if isinstance(out, tuple) else out
    x = model.text_projection(text.final_layer_norm(x)[torch.arange(3), names().argmax(1) + 4])
    assert_agree({"text": ours.encode_text(names())}, {"text": x / x.norm(dim=-1, keepdim=True)})

    export(ours.state_dict(), preset.config, coop.weights["official"], tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    original = torch.load(released / "ViT-B-32.pt", weights_only=True)
    assert torch.equal(back["ctx"], ctx) and all(torch.equal(back[f"clip.{k}"], v) for k, v in original.items()) and len(back) == len(original) + 1
    again, _ = import_(tmp_path / "back.pt", coop.weights["official"], presets)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


def test_a_context_for_each_class_and_what_does_not_fit(released, tmp_path):
    (tmp_path / "clip.pt").write_bytes((released / "ViT-B-32.pt").read_bytes())
    torch.save({"ctx": torch.randn(3, 4, WIDTH)}, tmp_path / "each.pth")
    ours, preset = import_(tmp_path / "each.pth", coop.weights["official"], presets)
    assert preset.config.text.kind == "specific" and ours.text.context.shape == (3, 4, WIDTH)
    torch.save({"ctx": torch.randn(4, 32)}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match="another CLIP"):
        import_(tmp_path / "wrong.pth", coop.weights["official"], presets)
    (tmp_path / "clip.pt").unlink()
    with pytest.raises(UserError, match=r"without the CLIP.*ViT-B-16\.pt"):
        import_(tmp_path / "each.pth", coop.weights["official"], presets)
    with pytest.raises(UserError, match="openai"):
        coop.weights["official"].write(coop.tiny().config)
