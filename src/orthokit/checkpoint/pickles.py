"""Pickles read without running them: values and tensors are built, every other object is only described.

A pickle is a program for a stack machine. This machine has no instruction that imports or calls anything: a name stays a name
(:class:`Global`), a call of a name stays a description (:class:`Thing`), and a short list of names that every checkpoint of
PyTorch uses (:data:`_KNOWN`) is answered by functions of this module.
"""

import io
import math
import pickletools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from orthokit.checks import printable

__all__ = ["ELEMENTS", "DamagedError", "Global", "Storage", "Thing", "plain_name", "read", "storage_key", "storage_type"]

LONGEST = 10_000_000
"""Most instructions of a pickle; a checkpoint of 20,000 layers has about a million."""
ELEMENTS = 2**48
"""Most elements of a tensor that is described at all."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name in the file, such as ``"collections.OrderedDict"``; nothing is imported for it."""

    name: str


@dataclass(slots=True, eq=False)
class Thing:
    """A Python object that the file describes: its class, its arguments, its state; nothing is built from them.

    Attributes:
        name: the object's class, or the function that would have made the object.
        state: what the object would have been given as attributes.
        entries: what the object would have been given as a mapping.
    """

    name: str
    arguments: Any = None
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Bytes of a file that tensors share."""

    content: Tensor
    dtype: torch.dtype


DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {
    **{f"torch.{name}Storage": dtype for name, dtype in (
        ("Double", torch.float64), ("Float", torch.float32), ("Half", torch.float16), ("BFloat16", torch.bfloat16),
        ("Long", torch.int64), ("Int", torch.int32), ("Short", torch.int16), ("Char", torch.int8), ("Byte", torch.uint8),
        ("Bool", torch.bool), ("ComplexDouble", torch.complex128), ("ComplexFloat", torch.complex64),
    )},
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.UntypedStorage": torch.uint8,
}  # fmt: skip


class DamagedError(ValueError):
    """The bytes are not a pickle, or not all of one."""


Stream = io.BytesIO | io.BufferedReader
Opener = Callable[[tuple[Any, ...]], Any]
"""A function from a persistent identifier to a :class:`Storage`, or whatever stands for one."""


def storage_type(value: object) -> torch.dtype | None:
    """The type of numbers that ``torch.FloatStorage`` and the like hold."""
    return _STORAGES.get(value.name) if isinstance(value, Global) else None


def storage_key(identifier: tuple[Any, ...]) -> str | int | None:
    """The name of a tensor's numbers in a persistent identifier; None if the identifier names something else.

    Raises:
        DamagedError: the name is not text. Hashing or printing a deeply nested tuple would end the process.
    """
    if identifier[:1] != ("storage",) or len(identifier) < 5:
        return None
    if not isinstance(identifier[2], (str, int)):
        raise DamagedError("the name of a tensor's numbers is not text")
    return identifier[2]


def read(stream: Stream, storage: Opener, others: dict[str, None]) -> Any:
    """The value of the next pickle in ``stream``.

    Args:
        stream: read up to the pickle's end.
        storage: opens what persistent identifiers name.
        others: gets the names of the classes and functions that were not run.

    Raises:
        DamagedError: the pickle cannot be read to its end.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, on escapes in the oldest kind of strings
            return _Machine(storage, others).run(stream)
    except DamagedError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedError(" ".join(str(error).split())[:200] or type(error).__name__) from None


class _Machine:
    """The stack machine. Each method is an instruction, named as :mod:`pickletools` names it."""

    def __init__(self, storage: Opener, others: dict[str, None]) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storage, self.others = storage, others

    def run(self, stream: Stream) -> Any:
        instructions = {name[3:].upper(): getattr(self, name) for name in dir(self) if name.startswith("do_")}
        for count, (code, argument, _) in enumerate(pickletools.genops(stream)):
            if count > LONGEST:
                raise DamagedError(f"it has more than {LONGEST:,} instructions")
            name = code.name
            if name == "STOP":
                return self.stack.pop()
            if name in _PLAIN:
                self.stack.append(argument)
            else:
                instructions[name](argument)
        raise DamagedError("it has no end")

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def do_proto(self, argument: int) -> None: ...

    do_frame = do_readonly_buffer = do_proto

    def do_mark(self, argument: None) -> None:
        self.below.append(self.stack)
        self.stack = []

    def do_pop(self, argument: None) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def do_pop_mark(self, argument: None) -> None:
        self.pop_mark()

    def do_dup(self, argument: None) -> None:
        self.stack.append(self.stack[-1])

    def do_put(self, argument: int) -> None:
        self.memo[argument] = self.stack[-1]

    do_binput = do_long_binput = do_put

    def do_memoize(self, argument: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_get(self, argument: int) -> None:
        self.stack.append(self.memo[argument])

    do_binget = do_long_binget = do_get

    def do_none(self, argument: None) -> None:
        self.stack.append(None)

    def do_newtrue(self, argument: None) -> None:
        self.stack.append(True)

    def do_newfalse(self, argument: None) -> None:
        self.stack.append(False)

    def do_empty_list(self, argument: None) -> None:
        self.stack.append([])

    def do_empty_dict(self, argument: None) -> None:
        self.stack.append({})

    def do_empty_tuple(self, argument: None) -> None:
        self.stack.append(())

    def do_empty_set(self, argument: None) -> None:
        self.stack.append(Thing("builtins.set"))

    def do_list(self, argument: None) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def do_tuple(self, argument: None) -> None:
        items = tuple(self.pop_mark())
        self.stack.append(items)

    def do_tuple1(self, argument: None) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def do_tuple2(self, argument: None) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def do_tuple3(self, argument: None) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def do_frozenset(self, argument: None) -> None:
        self.pop_mark()
        self.stack.append(Thing("builtins.frozenset"))

    def do_dict(self, argument: None) -> None:
        items = self.pop_mark()
        self.stack.append(_fill({}, zip(items[::2], items[1::2], strict=True)))

    def do_append(self, argument: None) -> None:
        value = self.stack.pop()
        if isinstance(self.stack[-1], list):
            self.stack[-1].append(value)

    def do_appends(self, argument: None) -> None:
        items = self.pop_mark()
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def do_additems(self, argument: None) -> None:
        self.pop_mark()

    def do_setitem(self, argument: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.enter([(key, value)])

    def do_setitems(self, argument: None) -> None:
        items = self.pop_mark()
        self.enter(zip(items[::2], items[1::2], strict=True))

    def enter(self, items: Iterable[tuple[Any, Any]]) -> None:
        target = self.stack[-1]
        _fill(target.entries if isinstance(target, Thing) else target if isinstance(target, dict) else {}, items)

    def do_global(self, argument: str) -> None:
        self.stack.append(Global(".".join(argument.split(" ", 1))))

    def do_stack_global(self, argument: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Global(f"{module}.{name}" if isinstance(name, str) and isinstance(module, str) else "?"))

    def do_ext1(self, argument: int) -> None:
        self.stack.append(Global(f"extension {argument}"))

    do_ext2 = do_ext4 = do_ext1

    def do_next_buffer(self, argument: None) -> None:
        self.stack.append(Thing("a buffer outside the file"))

    def do_persid(self, argument: str) -> None:
        self.stack.append(Thing("an object outside the file"))

    def do_binpersid(self, argument: None) -> None:
        key = self.stack.pop()
        self.stack.append(self.storage(key) if isinstance(key, tuple) else Thing("an object outside the file"))

    def do_reduce(self, argument: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.describe(function, arguments))

    do_newobj = do_reduce

    def do_newobj_ex(self, argument: None) -> None:
        self.stack.pop()
        self.do_reduce(None)

    def do_inst(self, argument: str) -> None:
        arguments = tuple(self.pop_mark())
        self.stack.append(self.describe(Global(".".join(argument.split(" ", 1))), arguments))

    def do_obj(self, argument: None) -> None:
        function, *arguments = self.pop_mark()
        self.stack.append(self.describe(function, tuple(arguments)))

    def do_build(self, argument: None) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Thing):
            self.stack[-1].state = state

    def describe(self, function: Any, arguments: Any) -> Any:
        """The value of a call that is known here, or a description of the call."""
        name = function.name if isinstance(function, Global) else "?"
        if name in _FROM_TYPE and isinstance(arguments, tuple) and len(arguments) == 4:  # (function, type, arguments, state)
            function, _, arguments, _ = arguments
            name = function.name if isinstance(function, Global) else "?"
        if name in ("copyreg._reconstructor", "copy_reg._reconstructor") and isinstance(arguments, tuple) and arguments:
            name = arguments[0].name if isinstance(arguments[0], Global) else "?"
            arguments = ()
        if name in _KNOWN and isinstance(arguments, tuple):
            return _KNOWN[name](*arguments)
        if name in _TENSORS:
            return Thing(_TENSORS[name])
        if name not in _HARMLESS:
            self.others.setdefault(name)
        return Thing(name, arguments)


_PLAIN = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8",
})  # fmt: skip
"""Instructions that push their argument."""
_FROM_TYPE = ("torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type", "torch.tensor._rebuild_from_type_v2")
_HARMLESS = ("torch.device", "torch.storage._load_from_bytes", "builtins.set", "__builtin__.set", "torch.Generator")


_TENSORS = {
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse",
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "on the meta device",
    "torch._utils._rebuild_wrapper_subclass": "a subclass of Tensor",
}
"""Functions that make tensors that are not read."""


def _fill(target: dict[Any, Any], items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """``target`` with the items that have a plain key. Hashing a deeply nested tuple would end the process."""
    target.update((key, value) for key, value in items if isinstance(key, (str, int, float, bytes, type(None))))
    return target


def _mapping(*arguments: Any) -> dict[Any, Any]:
    """A dictionary, ordered or with a default: the entries come after it, or as pairs."""
    content = arguments[-1] if arguments else None
    if isinstance(content, dict):
        return dict(content)
    pairs = content if isinstance(content, list) else []
    return _fill({}, [tuple(pair) for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2])


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: torch.dtype | None = None) -> Any:
    """A tensor over bytes of the file; nothing is copied."""
    if not isinstance(storage, Storage):
        return Thing(storage.name if isinstance(storage, Thing) else "a tensor without its numbers")
    whole = [offset, *size, *stride]
    if not all(type(number) is int and 0 <= number < ELEMENTS for number in whole) or len(size) > 16:
        raise DamagedError("a tensor has an impossible shape")
    if math.prod(size) >= ELEMENTS:
        return Thing(f"a tensor of {math.prod(size):.0e} elements")
    dtype = dtype or storage.dtype
    if not math.prod(size):
        return torch.empty(size, dtype=dtype)
    content = storage.content[: len(storage.content) // dtype.itemsize * dtype.itemsize]
    return content.view(dtype).as_strided(size, stride, offset)


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, *rest: Any) -> Any:
    if isinstance(dtype, Global) and dtype.name in DTYPES:
        return _tensor(storage, offset, size, stride, dtype=DTYPES[dtype.name])
    return Thing(f"a tensor of {getattr(dtype, 'name', '?')}")


def _first(value: Any = None, *rest: Any) -> Any:
    return value


def _encode(text: Any = "", encoding: Any = "latin1") -> Any:
    return text.encode("latin1") if isinstance(text, str) and encoding == "latin1" else Thing("bytes")


_KNOWN: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("collections.OrderedDict", "collections.Counter", "builtins.dict", "__builtin__.dict"), _mapping),
    "collections.defaultdict": lambda *arguments: _mapping(*arguments[1:]),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch.Size": _first,
    "torch.serialization._get_layout": _first,
    "_codecs.encode": _encode,
    **dict.fromkeys((f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("list", "tuple")), _first),
}


def plain_name(name: str, length: int = 60) -> str:
    """A name from a file, made printable and shortened in the middle."""
    return printable(name, length)
