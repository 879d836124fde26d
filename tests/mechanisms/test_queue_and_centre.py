"""First in, first out; the running mean."""
import pytest
import torch
import torch.nn.functional as F

from polysense.base.errors import UserError
from polysense.mechanisms.centre import Centre
from polysense.mechanisms.queue import Queue


def test_the_oldest_keys_are_overwritten_and_the_pointer_comes_round():
    queue = Queue.Config(size=6, width=3).build()
    born = queue.keys.clone()
    torch.testing.assert_close(born.norm(dim=1), torch.ones(6))
    pushed = [F.normalize(torch.randn(2, 3), dim=1) for _ in range(4)]
    for i, keys in enumerate(pushed[:3]):
        queue.push(keys)
        torch.testing.assert_close(queue.keys[:2 * i + 2], torch.cat(pushed[:i + 1]))
        assert torch.equal(queue.keys[2 * i + 2:], born[2 * i + 2:])
    assert int(queue.pointer) == 0
    queue.push(pushed[3])
    torch.testing.assert_close(queue.keys, torch.cat([pushed[3], *pushed[1:3]]))
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(6))


def test_a_batch_may_straddle_the_end_and_keys_become_unit():
    queue = Queue.Config(size=5, width=2).build()
    for _ in range(3):
        queue.push(torch.randn(3, 2) * 7)
    assert int(queue.pointer) == 9 % 5
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(5))


def test_queue_goes_on_after_a_state_dict():
    queue, twin = (Queue.Config(size=4, width=2).build() for _ in range(2))
    queue.push(torch.randn(3, 2))
    twin.load_state_dict(queue.state_dict())
    keys = torch.randn(2, 2)
    queue.push(keys)
    twin.push(keys)
    assert torch.equal(queue.keys, twin.keys) and int(queue.pointer) == int(twin.pointer) == 1
    assert not list(queue.parameters())


def test_more_keys_than_places_are_refused():
    with pytest.raises(UserError, match="keys of shape"):
        Queue.Config(size=4, width=2).build().push(torch.randn(5, 2))


def test_centre_is_the_running_mean_of_outputs():
    centre, m = Centre.Config(width=3, momentum=0.9).build(), 0.9
    one, two = torch.randn(2, 4, 3), torch.randn(5, 3)
    centre.move(one)
    torch.testing.assert_close(centre.value, (1 - m) * one.reshape(-1, 3).mean(0))
    centre.move(two)
    torch.testing.assert_close(centre.value, m * (1 - m) * one.reshape(-1, 3).mean(0) + (1 - m) * two.mean(0))
    torch.testing.assert_close(centre(two), two - centre.value)


def test_the_centre_of_all_ranks_is_the_centre_of_the_global_batch():
    output, whole, sharded = torch.randn(8, 3), Centre.Config(width=3).build(), Centre.Config(width=3).build()
    whole.move(output)
    sharded.move(torch.stack([output[:4].mean(0), output[4:].mean(0)]))
    torch.testing.assert_close(whole.value, sharded.value)
    twin = Centre.Config(width=3).build()
    twin.load_state_dict(whole.state_dict())
    assert torch.equal(twin.value, whole.value)
