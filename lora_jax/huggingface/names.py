"""Where each parameter stands in a Hugging Face checkpoint: its name there, and how its axes lie.

A stacked parameter stands for many tensors there (one for each layer, say), and a tensor there may join several axes (heads and
head size), so a name is a template and the axes are written as in einops: `"l d n h -> (n h) d"`.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from lora_jax.core import paths
from lora_jax.core.errors import InputError

Kind = Literal["linear", "conv1d", "embedding", "conv", "parameter", "parameter_transposed"]
Groups = tuple[tuple[str, ...], ...]
_FIELD = re.compile(r"\{(\w+)(?::([^{}]*))?\}")


@dataclasses.dataclass(frozen=True)
class HFName:
    """Where a parameter stands in a Hugging Face checkpoint.

    Args:
      name: the tensor's name there. A field `{l}` is the index along the axis l of the parameter, `{c:k|v}` the word for it.
      axes: `"parameter's axes -> tensor's axes"`: one word for each axis, `(n h)` for axes that the tensor joins. Axes that the
        name's fields index have no place on the right. Empty: the tensor is the parameter as it is.
      kind: what the tensor is the weight of: `"linear"` (out, in), `"conv1d"` (GPT-2's Conv1D: in, out), `"embedding"` (rows,
        size), `"conv"` (out, in, *window), or a parameter of its own: `"parameter"` ((experts,) out, in) or
        `"parameter_transposed"` (experts, in, out), which PEFT adapts by `target_parameters`; the latter only in modules that
        transformers marks `is_transposed` (GPT-OSS). Of no account for vectors.
      order: the place of a `"parameter"` among those of its module, as the module registers them.
      tied: the name of another tensor there that is the same parameter (a head tied to the embedding).

    Raises:
      InputError: the axes can't be read, or do not agree with the name's fields.

    >>> HFName("model.layers.{l}.mlp.up_proj.weight", "l i o -> o i").tensors((2, 3, 4))
    {(0,): 'model.layers.0.mlp.up_proj.weight', (1,): 'model.layers.1.mlp.up_proj.weight'}
    >>> HFName("attn.{c:k|v}_proj.weight", "c d h -> h d").tensors((2, 3, 4))
    {(0,): 'attn.k_proj.weight', (1,): 'attn.v_proj.weight'}
    """

    name: str
    axes: str = ""
    kind: Kind = "linear"
    order: int = 0
    tied: str = ""

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise InputError(f"{self.name}: kind must be one of {', '.join(map(repr, get_args(Kind)))}, not {self.kind!r}")
        fields = [field for field, _ in _FIELD.findall(self.name)]
        left, right = _read(self.axes)
        placed = [axis for group in right for axis in group]
        if sorted(left) != sorted(placed + fields) or len(set(left)) != len(left):
            raise InputError(
                f"{self.name}: the axes {self.axes!r} must name each axis of the parameter once on the left, and on the right "
                f"all but those that the name's fields index ({', '.join(fields) or 'none'})"
            )

    @property
    def indexed(self) -> tuple[int, ...]:
        """The parameter's axes that the name's fields index, in the order of the fields."""
        left, _ = _read(self.axes)
        return tuple(left.index(field) for field, _ in _FIELD.findall(self.name))

    def groups(self, ndim: int) -> tuple[tuple[int, ...], ...]:
        """The parameter's axes that each axis of the tensor joins.

        Args:
          ndim: how many axes the parameter has.

        >>> HFName("q_proj.weight", "d n h -> (n h) d").groups(3)
        ((1, 2), (0,))
        """
        if not self.axes:
            return tuple((axis,) for axis in range(ndim))
        left, right = _read(self.axes)
        return tuple(tuple(left.index(axis) for axis in group) for group in right)

    def tensors(self, shape: Sequence[int]) -> dict[tuple[int, ...], str]:
        """The names of the tensors of a parameter of this shape, by the index along the indexed axes.

        Args:
          shape: the parameter's.

        Raises:
          InputError: the parameter has another number of axes, or a field has not as many words as its axis is long.
        """
        if self.axes and len(shape) != len(_read(self.axes)[0]):
            raise InputError(f"{self.name}: a parameter of the shape {tuple(shape)} does not have the axes {self.axes!r}")
        choices = []
        for (field, words), axis in zip(_FIELD.findall(self.name), self.indexed):
            listed = words.split("|") if words else [str(i) for i in range(shape[axis])]
            if len(listed) != shape[axis]:
                raise InputError(f"{self.name}: the axis {field!r} has the size {shape[axis]}, but {len(listed)} words")
            choices.append(listed)
        indices = itertools.product(*(range(len(listed)) for listed in choices))
        return {index: self._fill([listed[i] for listed, i in zip(choices, index)]) for index in indices}

    def _fill(self, words: Sequence[str]) -> str:
        rest = iter(words)
        return _FIELD.sub(lambda match: next(rest), self.name)

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of each tensor of a parameter of this shape.

        Args:
          shape: the parameter's.

        >>> HFName("q.{l}.weight", "l d n h -> (n h) d").shape((2, 3, 4, 5))
        (20, 3)
        """
        return tuple(math.prod(shape[axis] for axis in group) for group in self.groups(len(shape)))

    def export(self, array: Any, index: tuple[int, ...] = ()) -> Any:
        """The tensor at an index, from the parameter's array (numpy's or JAX's).

        Args:
          array: the parameter.
          index: one number for each axis that the name's fields index.

        >>> import numpy as np
        >>> HFName("q.{l}.weight", "l d n h -> (n h) d").export(np.ones((2, 3, 4, 5)), (1,)).shape
        (20, 3)
        """
        picked: list[Any] = [slice(None)] * array.ndim
        for axis, i in zip(self.indexed, index):
            picked[axis] = i
        rest = [axis for axis in range(array.ndim) if axis not in self.indexed]
        groups = self.groups(array.ndim)
        order = [rest.index(axis) for group in groups for axis in group]
        return array[tuple(picked)].transpose(order).reshape(self.shape(array.shape))

    def restore(self, tensor: Any, shape: Sequence[int]) -> Any:
        """The inverse of `export`: the parameter's part at one index, without the indexed axes.

        Args:
          tensor: the tensor.
          shape: the parameter's, with the indexed axes.

        >>> import numpy as np
        >>> HFName("q.{l}.weight", "l d n h -> (n h) d").restore(np.ones((20, 3)), (2, 3, 4, 5)).shape
        (3, 4, 5)
        """
        placed = [axis for group in self.groups(len(shape)) for axis in group]
        split = tensor.reshape([shape[axis] for axis in placed])
        return split.transpose([placed.index(axis) for axis in sorted(placed)])


@functools.cache
def _read(axes: str) -> tuple[tuple[str, ...], Groups]:
    """Both sides of an axes string."""
    if not axes:
        return (), ()
    match = re.fullmatch(r"\s*((?:\w+\s*)+)->((?:\s*(?:\w+|\(\s*\w+(?:\s+\w+)*\s*\)))+)\s*", axes)
    if match is None:
        raise InputError(f"the axes {axes!r} can't be read: write them as 'd n h -> (n h) d'")
    right = re.findall(r"\(([^()]*)\)|(\w+)", match[2])
    return tuple(match[1].split()), tuple(tuple((joined or single).split()) for joined, single in right)


def match(variables: Any, rules: Mapping[str, "str | HFName | None"]) -> dict[str, HFName]:
    r"""The names of a model's parameters by rules, so that two lines describe a model.

    Args:
      variables: the parameter tree; arrays may be `jax.ShapeDtypeStruct`s.
      rules: `{regular expression for the whole path: HFName}`; the first that matches a path decides. `\1`, `\2`, ... in a name
        are the expression's groups; a plain string is an `HFName` of that name; `None` marks parameters that Hugging Face does
        not have.

    Raises:
      InputError: no rule matches a parameter, or two parameters get the same name.

    >>> import numpy as np
    >>> rules = {r"layer_(\d+)/mlp/(\w+)/kernel": HFName(r"model.layers.\1.mlp.\2_proj.weight", "i o -> o i")}
    >>> match({"layer_3": {"mlp": {"up": {"kernel": np.ones((2, 4))}}}}, rules)["layer_3/mlp/up/kernel"].name
    'model.layers.3.mlp.up_proj.weight'
    """
    leaves, _ = paths.flatten(variables)
    names: dict[str, HFName] = {}
    unmatched = []
    for path in leaves:
        found = next(((rule, m) for rule in rules if (m := re.fullmatch(rule, path))), None)
        if found is None:
            unmatched.append(path)
            continue
        rule, groups = found
        target = rules[rule]
        if target is not None:
            target = HFName(target) if isinstance(target, str) else target
            names[path] = dataclasses.replace(target, name=_filled(target.name, groups), tied=_filled(target.tied, groups))
    if unmatched:
        raise InputError(
            f"no rule matches the parameters {listing(unmatched)}: add one, or None for what is not in Hugging Face"
        )
    _check_distinct(names)
    return names


def _filled(name: str, groups: re.Match[str]) -> str:
    """A name with the groups that a rule has found in a path."""
    return groups.expand(name) if "\\" in name else name


def _check_distinct(names: Mapping[str, HFName]) -> None:
    by_name: dict[str, str] = {}
    for path, name in names.items():
        other = by_name.setdefault(name.name, path)
        if other != path:
            raise InputError(f"{other} and {path} have the same name {name.name}: give each parameter one of its own")


def listing(items: Iterable[str], most: int = 8) -> str:
    """The first few of a list, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
