"""Reads pickled data without importing or calling anything that it names."""

import pickle
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # since Python 2
_CONTAINERS = (set, frozenset, dict, list, tuple)
# What models keep of the standard library, and what cannot do harm where it is named.
_INERT = re.compile(
    r"(argparse|collections|copyreg|datetime|decimal|enum|fractions|logging|math|pathlib|random|re"
    r"|typing|uuid|itertools)\.[\w.]+|functools\.partial|types\.SimpleNamespace|contextlib\.nullcontext"
    r"|io\.(BytesIO|StringIO)|_codecs\.encode|_?collections\.\w+"
    rf"|builtins\.({'|'.join(t.__name__ for t in _CONTAINERS)}"
    r"|object|type|int|float|bool|complex|str|bytes|bytearray|slice|range|getattr)"
)
# Functions of libraries that rebuild data. Other functions are not called by files that hold models.
_REBUILDS = re.compile(
    r"torch\.(device|serialization\._get_layout)"
    r"|numpy(\.\w+)*\.(_reconstruct|scalar|dtype|ndarray|_frombuffer|__\w+_ctor)"
)


class Refused(Exception):
    """Pickled data names what no model needs; the argument is that name."""


@dataclass(frozen=True)
class Name:
    """What pickled data would import: never more than its name."""

    text: str


@dataclass(eq=False)
class Standin:
    """An object of a class that is not imported: where it came from, and what it was given."""

    origin: str
    arguments: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    items: dict[Any, Any] = field(default_factory=dict)
    entries: list[Any] = field(default_factory=list)

    def __setitem__(self, key: object, value: object) -> None:
        self.items[key] = value

    def append(self, value: object) -> None:
        """Keep an entry of what is a list or a set."""
        self.entries.append(value)

    add = append

    def extend(self, values: list[Any]) -> None:
        """Keep several entries."""
        self.entries.extend(values)

    def build(self, state: object) -> None:
        """Keep the attributes; of classes with slots there is a pair of them."""
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            self.attributes |= part if isinstance(part, dict) else {}


def is_refused(name: str) -> bool:
    """Tell whether pickled data that names this in the standard library is no model."""
    root = name.partition(".")[0]
    return root in (*sys.stdlib_module_names, *_RENAMED, "") and not _INERT.fullmatch(name)


class Interpreter(pickle._Unpickler):
    """Python's own reader of pickles, in which names stay names and calls are notes.

    Args:
        stream: A binary stream.
        builders: What stands in for the functions that rebuild tensors: from a name to a function of ours.
        persistent: Gives what a persistent id stands for.
    """

    stack: list[Any]
    append: Callable[[Any], None]

    def __init__(
        self, stream: Any, builders: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any]
    ) -> None:
        super().__init__(stream, encoding="utf-8", errors="replace")
        self.builders = _PLAIN_BUILDERS | dict(builders)
        self.persistent = persistent

    def persistent_load(self, pid: Any) -> Any:
        """Give what the id stands for."""
        return self.persistent(pid)

    def find_class(self, module: str, name: str) -> Any:
        """Give the name alone.

        Raises:
            Refused: No model needs it.
        """
        found = Name(f"{_RENAMED.get(module, module)}.{name}")
        if is_refused(found.text):
            raise Refused(found.text)
        return found

    def make(self, name: Any, arguments: tuple[Any, ...], *, called: bool = True) -> Any:
        """Note that something would have been made; rebuild what we know ourselves."""
        if not isinstance(name, Name):
            raise pickle.UnpicklingError(f"{type(name).__name__} is called")
        if name.text in self.builders:
            return self.builders[name.text](*arguments)
        if called and not _may_be_called(name.text):
            raise Refused(name.text)
        return Standin(name.text, arguments)

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], arguments)

    def _new_object(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], arguments, called=False)

    def _new_object_with_keywords(self) -> None:
        keywords = self.stack.pop()
        self._new_object()
        if isinstance(self.stack[-1], Standin):
            self.stack[-1].build(keywords)

    def _instantiate(self, name: Any, arguments: list[Any]) -> None:
        self.append(self.make(name, tuple(arguments), called=False))

    def _build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Standin):
            self.stack[-1].build(state)

    dispatch: ClassVar[dict[int, Any]] = pickle._Unpickler.dispatch | {
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _new_object,
        pickle.NEWOBJ_EX[0]: _new_object_with_keywords,
        pickle.BUILD[0]: _build,
    }


def _may_be_called(name: str) -> bool:
    """Let classes of any library be noted, and the functions that rebuild data."""
    is_class = name.rpartition(".")[2].lstrip("_")[:1].isupper()
    return is_class or bool(_INERT.fullmatch(name) or _REBUILDS.fullmatch(name))


_PLAIN_BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": dict,
    "collections.defaultdict": lambda _factory=None, *arguments: dict(*arguments),
    "_codecs.encode": lambda text, _encoding: text.encode("latin1"),  # how old protocols write bytes
    "torch.Size": tuple,
} | {f"builtins.{made.__name__}": made for made in _CONTAINERS}
