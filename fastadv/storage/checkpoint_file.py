"""What ``torch.save`` wrote, read without trust: nothing is called, no size believed.

``torch.load(weights_only=True)`` runs no code, but believes the sizes that a file claims: a
tensor's against its storage, a storage's against its record, a memo's. Here every size is checked
before memory is taken, and only plain values and dense tensors are read.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from math import prod
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

_MOST_VALUES = 4 << 20  # bytes of the part that is no tensor
_MOST_LISTING = 8 << 20  # bytes of the archive's list of records
_MOST_DIMENSIONS = 64
MOST_SHARED = 4  # tensors may share a storage: their bytes together, as a multiple of the file

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DTYPES = frozenset(_STORAGES.values())  # what a tensor may hold


class Damaged(Exception):
    """The file is not one that this module may read."""


def read(file: BinaryIO) -> Any:
    """The value in ``file``: None, bool, int, float, str, dicts, lists, tuples, CPU tensors.

    Memory is at most twice the file's bytes, and some for a file full of small values. Raises
    ``Damaged`` or what ``zipfile`` and ``pickle`` raise.
    """
    size = os.fstat(file.fileno()).st_size
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end is None or end[zipfile._ECD_SIZE] > _MOST_LISTING:  # type: ignore[attr-defined]
        raise Damaged("no archive, or too many records")
    with zipfile.ZipFile(file) as archive:
        return _Reader(archive, _records(archive, size), size).load()


def _records(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The records by their name below the archive's own folder; together not above ``size``."""
    found: dict[str, zipfile.ZipInfo] = {}
    entries = archive.infolist()
    for entry in entries:
        name = entry.filename.partition("/")[2]
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise Damaged("a compressed record")
        if entry.flag_bits & 1 or name in found:
            raise Damaged("an encrypted record, or one twice")
        found[name] = entry
    if sum(entry.file_size for entry in entries) > size:
        raise Damaged("records larger than the file")
    return found


class _Storage:
    """A record and what it holds; read once, when the first tensor is made of it."""

    def __init__(self, dtype: torch.dtype, key: str, count: int) -> None:
        self.dtype, self.key, self.count = dtype, key, count


class _Reader(pickle._Unpickler):
    """Python's own unpickler: that in C takes as much memory as a memo's number says."""

    def __init__(
        self, archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], size: int
    ) -> None:
        values = records.get("data.pkl")
        if values is None or values.file_size > _MOST_VALUES:
            raise Damaged("no values, or too many")
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise Damaged("another byte order")
        super().__init__(io.BytesIO(archive.read(values)))
        self._archive, self._records = archive, records
        self._left = MOST_SHARED * size
        self._whole: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise Damaged("a value that is neither plain nor a tensor")

    def get_extension(self, code: int) -> None:
        raise Damaged("a value that is neither plain nor a tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        right = isinstance(dtype, torch.dtype) and isinstance(key, str) and type(count) is int
        if kind != "storage" or not right or count < 0:
            raise Damaged("a storage of an unknown kind")
        record = self._records.get(f"data/{key}")
        if record is None or record.file_size != count * dtype.itemsize:
            raise Damaged("a storage of another size than its record")
        return _Storage(dtype, key, count)

    def load_build(self) -> None:
        # A state_dict's own attribute; on anything else it could undo what was checked.
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is not OrderedDict or set(state) != {"_metadata"}:
            raise Damaged("a value that is neither plain nor a tensor")
        target._metadata = state["_metadata"]  # type: ignore[attr-defined]

    stack: list[Any]  # pickle's own
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    dispatch[pickle.BUILD[0]] = load_build
    for _code in (pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX):
        dispatch.pop(_code[0])

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
        if not isinstance(storage, _Storage) or len(shape) != len(strides):
            raise Damaged("a tensor without a storage")
        numbers = [offset, *shape, *strides]
        plain = all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
        if not plain or len(shape) > _MOST_DIMENSIONS:
            raise Damaged("a tensor of an impossible shape")
        count = prod(shape)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if count and (last >= storage.count or count > storage.count):
            raise Damaged("a tensor larger than its storage")
        self._left -= count * storage.dtype.itemsize
        if self._left < 0:
            raise Damaged("tensors larger than the file")
        return self._values(storage).as_strided(shape, strides, offset)

    def _values(self, storage: _Storage) -> Tensor:
        if storage.key not in self._whole:
            content = bytearray(self._records[f"data/{storage.key}"].file_size)
            with self._archive.open(self._records[f"data/{storage.key}"]) as record:
                view, done = memoryview(content), 0
                while block := record.read(1 << 20):  # the archive's own checksum is looked at too
                    view[done : done + len(block)] = block
                    done += len(block)
            if done != len(content):
                raise Damaged("a record cut short")
            whole = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0)
            self._whole[storage.key] = whole.view(storage.dtype) if content else whole
        found = self._whole[storage.key]
        if found.dtype != storage.dtype:
            found = found.to(storage.dtype) if not found.numel() else found.view(storage.dtype)
        return found


def count_values(value: Any, most: int) -> None:
    """Raise ``Damaged`` where ``value`` holds more than ``most`` values: shared lists in shared
    lists can be short in a file and endless to walk."""
    left = most
    waiting = [value]
    while waiting:
        item = waiting.pop()
        left -= 1
        if left < 0:
            raise Damaged("endlessly many values")
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            waiting += item
