"""Other people's names for weights, and the layouts that they keep them in."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tether.errors import TetherError, received
from tether.types import Array

# --------------------------------------------------------------------------- layouts
# How a tensor of somebody else's file holds a weight.


@dataclass(frozen=True, init=False)
class Tensor:
    """A tensor of a file, and how it holds a weight of the model.

    Args:
        *names: What it is called. The first that a file has is read; the first is written.
        inputs: For a kernel as PyTorch's `Linear` stores it, outputs first: how many leading axes of the model's
            kernel are inputs. A kernel with an axis of heads is folded into two axes there. Left out, the tensor is
            laid out as the weight.
        folded: Whether all axes of the weight are one there, as in the bias of a projection to heads.
        part: `(k, n)`: the weight is the k-th of n equal parts of the tensor's first axis, as where query, key and
            value are one tensor; `(k, n, axis)` of another axis.
        axes: Any other layout: for each axis of the tensor, the weight's axis that it is, or several that are folded
            into it: `(3, 2, 0, 1)` for a convolution of PyTorch's, `(0, (1, 2))` for a kernel with heads, inputs
            first. `()` is an axis of size 1.
        skip: How many rows the tensor has before the weight's. Zeros are written there.

    Example:
    ```python
    names = {"head.kernel": tether.files.Tensor("lm_head.weight", "embed_tokens.weight", inputs=1)}
    tether.files.save_safetensors(model, "model.safetensors", names=names)
    tether.files.load_safetensors(model, "model.safetensors", names=names)
    ```
    """

    names: tuple[str, ...]
    inputs: int | None
    folded: bool
    part: tuple[int, ...] | None
    axes: tuple[tuple[int, ...], ...] | None
    skip: int

    def __init__(
        self,
        *names: str,
        inputs: int | None = None,
        folded: bool = False,
        part: tuple[int, ...] | None = None,
        axes: Sequence[int | Sequence[int]] | None = None,
        skip: int = 0,
    ) -> None:
        if not names or not all(type(name) is str and name for name in names):
            raise TetherError(f"A tensor of a file has a name, or several to look for. {received(names=names)}")
        if inputs is not None and (type(inputs) is not int or inputs < 1):
            raise TetherError(f"`inputs` is how many axes of a kernel are inputs. {received(inputs=inputs)}")
        if part is not None and (len(part) not in (2, 3) or not 0 <= part[0] < part[1]):
            raise TetherError(f"`part` is a number from 0, and how many parts there are. {received(part=part)}")
        if axes is not None and (inputs is not None or folded):
            raise TetherError("`axes` says the whole layout: leave out `inputs` and `folded`.")
        if type(skip) is not int or skip < 0:
            raise TetherError(f"`skip` is a number of rows. {received(skip=skip)}")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "folded", bool(folded))
        object.__setattr__(self, "part", None if part is None else tuple(part))
        groups = None if axes is None else tuple((each,) if isinstance(each, int) else tuple(each) for each in axes)
        object.__setattr__(self, "axes", groups)
        object.__setattr__(self, "skip", skip)

    def called(self, *names: str) -> Tensor:
        """The same layout under other names."""
        made = copy.copy(self)
        object.__setattr__(made, "names", names)
        return made

    @property
    def is_plain(self) -> bool:
        """Whether it is laid out as the weight."""
        return self.inputs is None and self.part is None and self.axes is None and not self.folded and not self.skip

    @property
    def part_axis(self) -> int:
        """The axis of which it is a part."""
        return self.part[2] if self.part is not None and len(self.part) == 3 else 0

    @property
    def leading_inputs(self) -> int | None:
        """How many leading axes of the weight are inputs, if it says so."""
        if self.inputs is None and self.axes is not None and len(self.axes) == 2:
            flat = [axis for group in self.axes for axis in group]
            return len(self.axes[0]) if flat == list(range(len(flat))) else None
        return self.inputs

    @property
    def is_whole(self) -> bool:
        """Whether it holds the weight and nothing else, with all inputs before all outputs or the other way round."""
        in_order = self.axes is None or self.leading_inputs is not None
        return in_order and self.part is None and not self.skip

    def describe(self) -> str:
        """What it holds, in a few words."""
        if self.inputs is not None:
            return "a kernel"
        return "a part" if self.part is not None else "folded, one" if self.folded else "in another layout, one"

    def _groups(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """The weight's axes that each axis of the tensor is."""
        if self.axes is not None and sorted(axis for group in self.axes for axis in group) == list(range(rank)):
            return self.axes
        if self.inputs is not None:
            return tuple(range(self.inputs, rank)), tuple(range(min(self.inputs, rank)))
        return (tuple(range(rank)),) if self.folded else tuple((axis,) for axis in range(rank))

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, of the weight's."""
        found = [math.prod(shape[axis] for axis in group) for group in self._groups(len(shape))]
        if self.part is not None:
            found[self.part_axis] *= self.part[1]
        if self.skip:
            found[0] += self.skip
        return tuple(found)

    def to_weight(self, array: Array, shape: tuple[int, ...]) -> Array:
        """The weight of this shape, from the tensor."""
        array = array[self.skip :] if self.skip else array
        if self.part is not None:
            array = np.split(array, self.part[1], axis=self.part_axis)[self.part[0]]
        order = [axis for group in self._groups(len(shape)) for axis in group]
        return array.reshape([shape[axis] for axis in order]).transpose(np.argsort(order)).reshape(shape)

    def to_file(self, weight: Array) -> Array:
        """The tensor, or this part of it, from the weight."""
        groups = self._groups(weight.ndim)
        folded = [math.prod(weight.shape[axis] for axis in group) for group in groups]
        turned = weight.transpose([axis for group in groups for axis in group]).reshape(folded)
        if self.skip:
            turned = np.concatenate([np.zeros((self.skip, *turned.shape[1:]), turned.dtype), turned])
        return np.ascontiguousarray(turned)


# --------------------------------------------------------------------------- tables
# What files of an architecture call its weights, as data.


class Table:
    r"""The names of an architecture's weights in other people's files.

    Args:
        tensors: By the model's name of a weight, with dots: its name in a file, a `Tensor`, or a list of these that
            must agree. `{n}` stands for a number, the same in both; `{p}` in a file's name for a prefix.
        prefixes: What `{p}` may be. All are read; the first is written.
        within: A regular expression of the layer that the architecture may be in another model.
        spare: A regular expression of tensors that a file may have and the model need not.
        heads: Further tensors of a weight in a model that has a certain other weight: by the weight's name, a regular
            expression of the other's name, and the tensor.
        instead: The same for tensors that take the place of the table's.

    Example:
    ```python
    table = tether.files.Table(
        {
            "block_{n}.dense.kernel": tether.files.Tensor("{p}layers.{n}.linear.weight", inputs=1),
            "block_{n}.dense.bias": "{p}layers.{n}.linear.bias",
        },
        prefixes=("", "model."),
        spare=r"lm_head\..*",
    )
    assert table.of("block_3.dense.bias")[0].names == ("layers.3.linear.bias", "model.layers.3.linear.bias")
    ```
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        *,
        prefixes: Sequence[str] = ("",),
        within: str | None = None,
        spare: str | None = None,
        heads: Mapping[str, tuple[str, Tensor]] | None = None,
        instead: Mapping[str, tuple[str, Tensor]] | None = None,
    ) -> None:
        for name, value in tensors.items():
            several = value if isinstance(value, (list, tuple)) else [value]
            if not all(each is None or isinstance(each, (str, Tensor)) for each in several):
                raise TetherError(
                    "A table has for a name of the model a name in the file, a `tether.files.Tensor`, a list of these, "
                    f"or None. {received(name=name, value=value)}"
                )
        self.prefixes = tuple(prefixes) or ("",)
        self._exact = {name: value for name, value in tensors.items() if not has_place(name)}
        self._templates = [(name, _Template(name), value) for name, value in tensors.items() if has_place(name)]
        self._within = None if within is None else re.compile(within)
        self._spare = None if spare is None else re.compile(spare)
        self._heads, self._instead = dict(heads or {}), dict(instead or {})

    def of(self, name: str, known: Collection[str] = ()) -> list[Tensor] | None:
        """The tensors of a weight, given all names of the model; `None` for what the table has not."""
        name = self._inside(name)
        number, found, key = "", self._exact.get(name), name
        if name not in self._exact:
            for template, pattern, value in self._templates:
                match = pattern.match(name, map(self._inside, known))
                if match is not None:
                    number, found, key = match, value, template
                    break
        if found is None:
            return None
        several = [*(found if isinstance(found, (list, tuple)) else [found])]
        for others, instead in ((self._heads, False), (self._instead, True)):
            other = others.get(key)
            if other is not None and any(re.fullmatch(other[0], each) for each in known):
                several = [other[1]] if instead else [*several, other[1]]
        return [self._named(Tensor(each) if isinstance(each, str) else each, number) for each in several]

    def is_within(self, known: Collection[str]) -> bool:
        """Whether the architecture is a layer of the model."""
        return any(self._inside(name) != name for name in known)

    def is_spare(self, name: str) -> bool:
        """Whether a tensor is a buffer, or of a head that the model need not have."""
        return self._spare is not None and self._spare.fullmatch(name) is not None

    def _inside(self, name: str) -> str:
        """The name without that of the architecture's own layer, if it is in another model."""
        head, _, rest = name.partition(".")
        return rest if rest and self._within is not None and self._within.fullmatch(head) else name

    def _named(self, tensor: Tensor, number: str) -> Tensor:
        found = [
            name.replace("{n}", number).replace("{n-1}", str(int(number or 0) - 1)).replace("{p}", prefix)
            for name in tensor.names
            for prefix in (self.prefixes if "{p}" in name else ("",))
        ]
        return tensor.called(*found)


_PLACE = re.compile(r"\{(n|\d)\}")


def has_place(name: str) -> bool:
    """Whether a name stands for several, by a place for a number."""
    return _PLACE.search(name) is not None


class _Template:
    """A name with places for numbers."""

    def __init__(self, name: str) -> None:
        pieces = _PLACE.split(name)
        made, self.nth = re.escape(pieces[0]), None
        seen: set[str] = set()
        for place, rest in zip(pieces[1::2], pieces[2::2], strict=True):
            if place != "n" and (self.nth is not None and place != str(self.nth)):
                raise TetherError(f"A name has one place for a number that Keras gives. {received(name=name)}")
            if place != "n":
                self.nth = int(place)
            group = "n" if place == "n" else "k"
            digits = r"\d+" if place == "n" else r"(?:_\d+)?"
            made += (f"(?P={group})" if group in seen else f"(?P<{group}>{digits})") + re.escape(rest)
            seen.add(group)
        self.pattern = re.compile(made)

    def match(self, name: str, known: Iterable[str]) -> str | None:
        """The number `n` of a name that the template stands for (empty if it has none); `None` for another name."""
        found = self.pattern.fullmatch(name)
        if found is None:
            return None
        number = found.groupdict().get("n", "")
        if self.nth is None:
            return number
        alike = (self.pattern.fullmatch(each) for each in {name, *known})
        places = {int(m["k"][1:] or -1) for m in alike if m is not None and m.groupdict().get("n", "") == number}
        return number if sorted(places).index(int(found["k"][1:] or -1)) == self.nth else None


__all__ = ["Table", "Tensor"]
