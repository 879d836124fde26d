"""SAM's two-way attention takes the products in the cheaper order; the numbers and gradients are those of plain attention."""
import pytest
import torch

from polysense.connectors.prompt import PromptEncoder
from polysense.decoders.mask import Across
from polysense.nn.maps import mixing, softmax_map

WIDTH, HEADS, PLACES = 64, 4, 50             # 8 features a head: up to 7 tokens take the short way


def made(tokens: int) -> tuple[Across, list[torch.Tensor]]:
    torch.manual_seed(0)
    across = Across(Across.Config(width=WIDTH, heads=HEADS))
    with torch.no_grad():
        for p in across.parameters():
            p.normal_(std=0.2)
    return across, [torch.randn(3, n, WIDTH, requires_grad=True) for n in (tokens, tokens, PLACES, PLACES)]


def both(across: Across, given: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    x, other, key, image = given
    short = [across.gather(x, key, image), across.spread(image, key, x, other)]
    plain = [across(x, key, value=image), image + across(key, x, value=other)]
    return short, plain


@pytest.mark.parametrize("tokens", [1, 7, 12])
def test_both_orders_give_the_same_numbers_and_gradients(tokens: int):
    across, given = made(tokens)
    wanted = [*given, *across.parameters()]
    for short, plain in zip(*both(across, given), strict=True):
        torch.testing.assert_close(short, plain, atol=1e-5, rtol=1e-5)
        weight = torch.randn_like(short)
        got, want = (torch.autograd.grad((y * weight).sum(), wanted, allow_unused=True, retain_graph=True) for y in (short, plain))
        for name, a, b in zip([*"xoki", *dict(across.named_parameters())], got, want, strict=True):
            assert (a is None) == (b is None), f"{name} is reached in one order alone"
            if a is not None:
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("tokens", "projected"), [(7, 0), (8, PLACES)])
def test_with_few_tokens_no_place_is_projected(tokens: int, projected: int):
    across, given = made(tokens)
    read = []
    for linear in (across.q, across.k, across.v):
        linear.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    x, other, key, image = given
    across.gather(x, key, image)
    across.spread(image, key, x, other)
    assert read.count(PLACES) == (3 if projected else 0) and read.count(tokens) == 3


def test_a_hand_in_the_attention_is_felt():
    across, (x, _, key, image) = made(5)
    with mixing(across, lambda name, q, k, v, mask: softmax_map(q, k, mask) @ v * 0):
        torch.testing.assert_close(across.gather(x, key, image), across.out.bias.expand(3, 5, -1))


def test_the_grid_is_coded_once_and_anew_for_other_frequencies():
    prompt = PromptEncoder(PromptEncoder.Config(width=16))
    with torch.inference_mode():
        first = prompt.grid(4, 6)
        assert prompt.grid(4, 6) is first and prompt.grid(6, 4) is not first
    torch.testing.assert_close(prompt.grid(4, 6), first)
    (prompt.grid(4, 6) * torch.ones(16, requires_grad=True)).sum().backward()         # made without a graph, fit for training
    prompt.load_state_dict(prompt.state_dict() | {"frequencies": torch.zeros(2, 8)})
    torch.testing.assert_close(prompt.grid(4, 6), torch.cat([torch.zeros(24, 8), torch.ones(24, 8)], 1))
