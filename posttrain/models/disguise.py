"""Classes of ours in place of a module's own, and what of them leaves the process.

A module is given a subclass of the class it has, of the same name, with a class of ours before it: what that defines
happens, and everything else stays. A copy has our classes, like the module it comes from. A pickle, as `torch.save` and
other processes get it, holds the module's own class and the model's own attention, so it loads where there is no
posttrain, as it was before.

`copy` and `pickle` ask an object the same, so both get things here whose copy isn't what a pickle of them holds. With a
method `__deepcopy__` the two differ, too, but PEFT's wrappers would take that of the model inside for their own.
"""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any, SupportsIndex


class Disguise:
    """What all classes of ours that stand before a module's own come from."""

    def __reduce_ex__(self: Any, protocol: SupportsIndex) -> Any:
        if not issubclass(type(self).__bases__[0], Disguise):  # a class of FSDP2's, which is never pickled
            return super().__reduce_ex__(protocol)
        state: Any = super().__reduce_ex__(2)[2]
        outside = {name: value for name, value in state.items() if not name.startswith("_posttrain")}
        return object.__new__, (_Here(type(self), own(type(self))),), _Here(state, outside)

    def __copy__(self: Any) -> Any:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied


class _Here:
    """In a copy this is `here`, in a pickle `outside`."""

    def __init__(self, here: Any, outside: Any) -> None:
        self.here = here
        self.outside = outside

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.here, memo)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return copy.copy, (self.outside,)


class AttentionName(str):
    """The name of our attention in a model's configuration; `before` is the one that a pickle holds."""

    before: str
    by_enable = False

    def __new__(cls, name: str, before: str) -> "AttentionName":
        self = super().__new__(cls, name)
        self.before = before
        return self

    def __copy__(self) -> "AttentionName":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionName":
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return str, (str(self.before),)


class Mark:
    """True; in a pickle False."""

    def __copy__(self) -> "Mark":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mark":
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return bool, ()


def disguised(original: Any, ours: type[Disguise], **body: Any) -> type:
    """A subclass of `original`, with its name, that has what `ours` and `body` define."""
    shown = {"__module__": original.__module__, "__doc__": original.__doc__}
    return type(original.__name__, (ours, original), {**shown, **body})


def put_on(module: Any, make: Callable[[Any], type]) -> None:
    """Give `module` the class that `make` makes of the one it has, below that which FSDP2 gives what it shards."""
    cls: Any = type(module)
    if not _of_fsdp2(cls):
        module.__class__ = make(cls)
        return
    first, second = cls.__bases__
    module.__class__ = type(cls.__name__, (first, make(second)), {"__deepcopy__": vars(cls)["__deepcopy__"]})


def take_off(module: Any, ours: type[Disguise]) -> None:
    """Undo `put_on` of a class derived from `ours`, also in the bound methods that Accelerate keeps in a module.

    Its hooks (`dispatch_model`) call `_old_forward`, which their own `forward` wraps; its mixed precision keeps
    `_original_forward`.
    """
    worn = type(module).forward
    module.__class__ = _without(type(module), ours)
    kept = module.__dict__
    for held in (kept, getattr(kept.get("forward"), "__dict__", {})):
        for name in ("_old_forward", "_original_forward", "forward", "__wrapped__"):
            bound: Any = held.get(name)
            if getattr(bound, "__func__", None) is worn:
                held[name] = MethodType(type(module).forward, bound.__self__)


def _without(cls: Any, ours: type[Disguise]) -> Any:
    """`cls` without the class, derived from `ours`, that stands before the original among its bases.

    FSDP2 gives a module that it shards a class (FSDPModule, what it was), which can't be copied; ours is in the second.
    """
    first, second = cls.__bases__[:2]
    if issubclass(first, ours):
        return second
    return type(cls.__name__, (first, _without(second, ours)), {"__deepcopy__": vars(cls)["__deepcopy__"]})


def own(cls: Any) -> Any:
    """`cls` without the classes of ours, and of FSDP2, that stand before it."""
    while issubclass(cls.__bases__[0], Disguise) or _of_fsdp2(cls):
        cls = cls.__bases__[1]
    return cls


def _of_fsdp2(cls: type) -> bool:
    return cls.__bases__[0].__name__ == "FSDPModule"
