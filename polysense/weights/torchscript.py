"""The tensors of a TorchScript archive, without running any of its code.

OpenAI published CLIP as TorchScript. `torch.jit.load` compiles and runs what the archive contains; here only its data are read: the module
tree is unpickled into inert records by an unpickler that knows five names, and tensors are cut from the archive's storages.
"""
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from polysense.base.errors import UserError

TYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "DoubleStorage": torch.float64,
         "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
         "ByteStorage": torch.uint8, "BoolStorage": torch.bool}


class _Record:
    """Stands for any module of the archive; holds its attributes and can do nothing."""

    def __init__(self, *_: Any):
        self.parts: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.parts = cast(dict[str, Any], state) if isinstance(state, dict) else {}


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _first(value: Any, *_: Any) -> Any:
    return value


class _Reader(pickle.Unpickler):
    """An unpickler to which nothing can be named but tensors, their storages, lists and inert records."""

    def __init__(self, data: bytes, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(data))
        self.archive, self.root, self.storages = archive, root, dict[str, Tensor]()

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Record
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _tensor
        if (module == "torch._utils" and name == "_rebuild_parameter") or module == "torch.jit._pickle":
            return _first
        if module == "torch" and name in TYPES:
            return TYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, *_ = pid
        if key not in self.storages:
            raw = self.archive.read(f"{self.root}/data/{key}")
            self.storages[key] = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return self.storages[key]


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive (a zip file with a module tree and its constants)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        ends = {n.split("/", 1)[-1] for n in archive.namelist()}
    return {"constants.pkl", "data.pkl"} <= ends


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Every tensor of the module tree under its dotted name, parameters, buffers and tensor attributes alike.

    Raises UserError for an archive that names anything but modules and tensors, or that cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(n for n in archive.namelist() if n.endswith("/data.pkl")).removesuffix("/data.pkl")
            out: dict[str, Tensor] = {}
            _walk(_Reader(archive.read(f"{root}/data.pkl"), archive, root).load(), "", out)
    # RuntimeError: a tensor that reaches beyond its storage, a tree that contains itself
    except (pickle.UnpicklingError, zipfile.BadZipFile, LookupError, EOFError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read the TorchScript archive {path.name} ({error})", "fetch it again, or convert it to safetensors") from error
    return out


def _walk(node: Any, at: str, out: dict[str, Tensor]) -> None:
    if isinstance(node, Tensor):
        out[at] = node
    elif isinstance(node, _Record):
        for name, part in node.parts.items():
            _walk(part, f"{at}.{name}" if at else name, out)
