"""Give a module another class, one derived from its own, that survives deepcopy and pickle.

A method set on the instance would not survive deepcopy: the copy's would act on the original. A
class made at run time does, but pickle looks classes up by name; so an instance is pickled as how
its class was made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Make = Callable[..., type]


def swap_class(module: Any, make: Make, *args: Any) -> None:
    """Make `module` an instance of make(its class, *args).

    Args:
        make: a function that pickle finds by its name. The class has the name of the given one,
            which transformers goes by, and derives from it.
        args: hashable.
    """
    kind, swaps = vars(type(module)).get("_swaps", (type(module), ()))
    module.__class__ = _made(kind, (*swaps, (make, args)))


def mixed(kind: type, mixin: type) -> type:
    """Return a class of `kind`'s name whose methods are `mixin`'s, then `kind`'s."""
    return type(kind.__name__, (mixin, kind), {})


@functools.cache
def _made(kind: type, swaps: tuple[tuple[Make, tuple[Any, ...]], ...]) -> Any:
    """Return the class of a module of class `kind` after all its swaps."""
    make, args = swaps[-1]
    made: Any = make(_made(kind, swaps[:-1]) if swaps[:-1] else kind, *args)

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        reduced = super(made, self).__reduce_ex__(protocol)
        if type(self) is not made:  # of a class derived from it, which is another's to find
            return reduced
        return (_new, (kind, swaps), *reduced[2:])

    made._swaps = kind, swaps
    made.__reduce_ex__ = reduce
    return made


def _new(kind: type, swaps: tuple[tuple[Make, tuple[Any, ...]], ...]) -> Any:
    made = _made(kind, swaps)
    return made.__new__(made)
