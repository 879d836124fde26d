"""One process or many: the only file that knows ranks. Started by torchrun, the ranks share each global batch and end with the same weights."""
import gc
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polysense.base.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

BLOCK = re.compile(r"(?:^|\.)(?:blocks\.\d+|stages\.\d+\.\d+)$")
KINDS = ("ddp", "fsdp")


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the best there is: CUDA (this process's own under torchrun), Apple's MPS, the CPU."""
    if name:
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"no device {name!r} here", "leave the device out, or use cpu") from error
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


class World:
    """The processes of a run as seen from one of them. Without torchrun: one, and every method is free.

    kind: "ddp" keeps all weights on every rank and averages gradients; "fsdp" shards weights, gradients and optimiser state (FSDP2).
    Gradients and logged losses are means over ranks: an objective's mean over ranks is its value on the global batch.
    """

    def __init__(self, device: torch.device | None = None, kind: str = "ddp"):
        if kind not in KINDS:
            raise UserError(f"no way {kind!r} to spread a run", f"it is {' or '.join(KINDS)}")
        self.device, self.kind = device or torch.device("cpu"), kind
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.sharded = kind == "fsdp" and self.size > 1
        self.alone: list[nn.Parameter] = []              # parameters whose gradients no wrapper averages

    # models

    def wrap(self, call: nn.Module, whole_batches: bool) -> nn.Module:
        """`call` (a gradients.Call) ready for this world. whole_batches: each step is forward and backward of one graph or of a sum of them.

        DDP averages such gradients while they come; with gradient caching they are averaged after it, by `settle`. FSDP2 shards every
        transformer or residual block and then the rest; scalars (temperatures) stay whole on every rank.
        """
        trained = [p for p in call.parameters() if p.requires_grad]
        if self.size == 1:
            return call
        synchronise_norms(call)
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            small = {p for p in call.parameters() if p.ndim == 0}
            self.alone = [p for p in small if p.requires_grad]
            if not any(_is_shard(p) for p in call.parameters()):
                for name, module in list(call.named_modules()):
                    if BLOCK.search(name):
                        fully_shard(module, ignored_params=small)
            fully_shard(call, ignored_params=small)
            return call
        for tensor in (*call.parameters(), *call.buffers()):
            dist.broadcast(tensor.detach(), 0)
        if whole_batches:
            with warnings.catch_warnings():  # torch 2.13 announces another name, which older ones do not know
                warnings.simplefilter("ignore", FutureWarning)
                return nn.parallel.DistributedDataParallel(call, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.alone = trained
        return call

    def sync(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Context of a forward and backward: DDP exchanges gradients in the last one only."""
        return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) and not last else nullcontext()

    def settle(self) -> None:
        """Averages the gradients that no wrapper averaged, in one message."""
        grads = [p.grad for p in self.alone if p.grad is not None]
        if grads:
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            for g, mean in zip(grads, flat.div_(self.size).split([g.numel() for g in grads])):
                g.copy_(mean.view_as(g))

    # numbers and agreement

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def agreed(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def leading(self, do: Callable[[], Any]) -> Any:
        """What `do` returns on rank 0, on every rank; a UserError there is raised on every rank."""
        if self.size == 1:
            return do()
        told: tuple[Any, UserError | None] = (None, None)
        if self.first:
            try:
                told = do(), None
            except UserError as error:
                told = None, UserError(error.what, error.advice)
        value, error = self.agreed(told)
        if error is not None:
            raise error
        return value

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, in order of ranks."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value)
        return out

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def spreading(self) -> AbstractContextManager[Any]:
        """Context in which contrastive objectives see the embeddings of all ranks."""
        if self.size == 1:
            return nullcontext()
        from polysense.objectives.spread import spread

        return spread(dist.group.WORLD)


@contextmanager
def world(device: str | None = None, kind: str = "ddp") -> Iterator[World]:
    """The world of this process: joins the others where torchrun started it (NCCL on CUDA, gloo elsewhere), and leaves them at the end."""
    place = pick_device(device)
    mine = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if mine:
        if place.type == "cuda":
            torch.cuda.set_device(place)
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    try:
        yield World(place, kind)
    finally:
        if mine:
            gc.collect()                     # wrapped models die before the group that they talk through
            dist.destroy_process_group()


def _is_shard(tensor: Any) -> TypeGuard["DTensor"]:
    """Asked without importing DTensor, which takes a second: where nobody has, there are none."""
    known = sys.modules.get("torch.distributed.tensor")
    return known is not None and isinstance(tensor, known.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if _is_shard(tensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor put together (every rank must call); any other tensor itself."""
    return tensor.full_tensor() if _is_shard(tensor) else tensor


def alike(value: Tensor, other: Tensor) -> Tensor:
    """A tensor that every rank holds whole, for arithmetic with `other`, which may be sharded."""
    if not _is_shard(other):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(value, other.device_mesh, [Replicate()] * other.device_mesh.ndim, run_check=False)


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together, shards of other ranks included. [] on the device of the first."""
    sharded = [t.to_local() for t in tensors if _is_shard(t)]
    square = torch.zeros((), device=tensors[0].device)
    if sharded:
        square = square + torch.stack(torch._foreach_norm(sharded)).square().sum()
        dist.all_reduce(square)
    if plain := [t for t in tensors if not _is_shard(t)]:
        square = square + torch.stack([n.float() for n in torch._foreach_norm(plain)]).square().sum()
    return square.sqrt()


class SumOverRanks(torch.autograd.Function):
    """Sum over ranks; the gradient of every rank's input is the sum of the gradients of all outputs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return SumOverRanks.forward(ctx, grads[0].contiguous())


class SyncNorm:
    """Mixed into a batch norm: statistics over the batches of all ranks, on any device (torch's SyncBatchNorm needs a GPU)."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self: Any, input: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape; plain batch norm where the running statistics are used."""
        if not self.training and self.track_running_stats:
            return super().forward(input)  # type: ignore[misc]
        dims = [d for d in range(input.ndim) if d != 1]
        x, shape = input.float(), [1, -1] + [1] * (input.ndim - 2)
        count = x.new_full((1,), x.numel() / x.shape[1])
        moments = SumOverRanks.apply(torch.cat([x.sum(dims), count]))
        n = moments[-1].detach()
        mean = moments[:-1] / n
        centred = x - mean.view(shape)
        variance = SumOverRanks.apply(centred.square().sum(dims)) / n
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                self.running_var.lerp_((variance * n / (n - 1).clamp(min=1)).to(self.running_var.dtype), share)
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)


def synchronise_norms(module: nn.Module) -> None:
    """Turns every batch norm inside into `SyncNorm`, in place: same names, same tensors."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and not isinstance(m, SyncNorm):
            m.__class__ = type(type(m).__name__, (SyncNorm, type(m)), {})
