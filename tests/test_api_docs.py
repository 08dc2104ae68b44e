"""The documentation of every public name says what it is, what goes in, what it raises, and how it is used.

Public are `lora_jax.__all__`, what the modules in it list in their own `__all__`, and the methods of the classes among these.
"""

import ast
import builtins
import functools
import inspect
import pathlib
import pydoc
import re
import textwrap
import types
from typing import Any, NamedTuple

import flax.linen as nn
import pytest

import lora_jax as lj
from lora_jax.core import errors

METHODS = types.FunctionType, property, classmethod, staticmethod
LINEN = ("parent", "name")  # which every Linen module has
# `(rows, tokens)`, `(*batch)`, or in words
SHAPE = re.compile(r"`[^`]*\(([\w*/ ]+,[\w*/,. ]*|\*\w+)\)[^`]*`|scalar|shape|PRNG key|\{path: ")
ENTRY = re.compile(r"^  (\w+(?:, \w+)*): ", re.M)


class Documented(NamedTuple):
    """A public function, class or method.

    `owner`: the class of a method.
    """

    value: Any
    owner: Any = None

    @property
    def doc(self):
        return inspect.getdoc(self.value) or ""

    @property
    def function(self):
        """What runs: of a class, what makes it; `None` where nothing of the library does."""
        if not inspect.isclass(self.value):
            return inspect.unwrap(getattr(self.value, "fget", None) or getattr(self.value, "__func__", self.value))
        made = (vars(self.value).get(name) for name in ("__post_init__", "__init__"))
        return next((function for function in made if inspect.isfunction(function) and _is_written(function)), None)

    @property
    def parameters(self):
        if isinstance(self.value, property) or (inspect.isclass(self.value) and issubclass(self.value, Exception)):
            return {}
        if getattr(self.value, "_is_protocol", False):
            return {name: found for name, found in vars(self.value).items() if isinstance(found, property)}
        found = dict(inspect.signature(getattr(self.value, "__func__", self.value)).parameters)
        if self.owner is not None:
            found.pop(next(iter(found)))  # `self` or `cls`
        linen = inspect.isclass(self.value) and issubclass(self.value, nn.Module)
        return {name: parameter for name, parameter in found.items() if not (linen and name in LINEN)}


def _walk(prefix, module):
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value):
            yield f"{prefix}{name}", value
            yield from _walk(f"{prefix}{name}.", value)
        elif callable(value):
            yield f"{prefix}{name}", Documented(value)
            for own, method in vars(value).items() if inspect.isclass(value) else ():
                if isinstance(method, METHODS) and (own == "__call__" or not own.startswith("_")):
                    yield f"{prefix}{name}.{own}", Documented(method, owner=value)


def _is_written(function):
    """Whether somebody wrote it, and not `dataclasses`."""
    return pathlib.Path(function.__code__.co_filename).is_relative_to(pathlib.Path(lj.__file__).parent)


FOUND = dict(_walk("", lj))
MODULES = {name: value for name, value in FOUND.items() if inspect.ismodule(value)}
NAMES = {name: value for name, value in FOUND.items() if not inspect.ismodule(value)}
every_name = pytest.mark.parametrize("name", NAMES)


def section(doc, title):
    """The entries of a section, by name; those that several names share, by each."""
    found = re.search(rf"^{title}:\n((?:  .*\n|\n)+)", doc + "\n", re.M)
    _, *parts = ENTRY.split(found[1]) if found else [""]
    return {name: text for names, text in zip(parts[::2], parts[1::2]) for name in names.split(", ")}


def test_all_parts_are_walked():
    assert {"train.make_train_step", "LowRank.delta", "peft.rules.maxtext_gemma2", "models.llama.Loaded.apply"} <= NAMES.keys()


@every_name
def test_summary(name):
    """One line, of one sentence or more."""
    first, *rest = NAMES[name].doc.splitlines() or [""]
    assert first.endswith(".") and (not rest or not rest[0]), first


@every_name
def test_arguments(name):
    one = NAMES[name]
    assert section(one.doc, "Args").keys() == one.parameters.keys()


@every_name
def test_shapes(name):
    """Of each argument and result that is annotated as an array: its shape, or that it is a scalar, a key or a tree."""
    one = NAMES[name]
    said = section(one.doc, "Args")
    for argument, parameter in one.parameters.items():
        if _is_array(getattr(parameter, "annotation", "")):
            assert SHAPE.search(said[argument]), f"{argument}: {said[argument]}"
    if one.function and not inspect.isclass(one.value) and _is_array(one.function.__annotations__.get("return")):
        assert SHAPE.search(re.sub(r"^Args:\n(?:  .*\n|\n)+", "", one.doc, flags=re.M))


def _is_array(annotation):
    text = str(annotation)
    return "Callable" not in text and re.search(r"jax.*Array|ndarray|ArrayLike", text)


@every_name
def test_errors(name):
    """What it raises itself, or a function does that it calls by name, is among what it says; and that exists."""
    one = NAMES[name]
    said = [_exception(raised) for raised in section(one.doc, "Raises")]
    for raised in _raised(one.function) if one.function else ():
        assert any(issubclass(raised, wide) for wide in said), f"{raised.__name__} is not among {said}"


@functools.cache
def _tree(function):
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def _raised(function):
    """The classes of errors that a function raises in its body, or in that of a function of the library that it calls."""
    called = [_resolved(function, node.func) for node in ast.walk(_tree(function)) if isinstance(node, ast.Call)]
    ours = [one for one in called if inspect.isfunction(one) and one.__module__.startswith("lora_jax")]
    return {_exception(name) for one in {function, *map(inspect.unwrap, ours)} for name in _raise_statements(one)}


def _raise_statements(function):
    for node in ast.walk(_tree(function)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            yield node.exc.func.id


def _resolved(function, node):
    """What a name, with attributes or without, is in a function's module."""
    if isinstance(node, ast.Name):
        return function.__globals__.get(node.id)
    if isinstance(node, ast.Attribute):
        value = _resolved(function, node.value)
        return getattr(value, node.attr, None) if inspect.ismodule(value) else None
    return None


def _exception(name):
    found = getattr(errors, name, None) or getattr(builtins, name)
    assert issubclass(found, Exception)
    return found


@every_name
def test_example(name):
    """Of its own; a method may be in that of its class or a base class, and a property, which takes nothing, needs none."""
    one = NAMES[name]
    method = name.rpartition(".")[2].replace("__call__", "apply")  # Linen's
    above = [inspect.getdoc(kind) or "" for kind in inspect.getmro(one.owner or object)]
    used = re.search(rf"^(?:>>>|\.\.\.) .*\.{method}\b", "\n".join(above), re.M)
    assert ">>> " in one.doc or isinstance(one.value, property) or used


@pytest.mark.parametrize("name", ["", *MODULES])
def test_pydoc(name):
    """`python -m pydoc lora_jax.train` says first what the module is for, and then has all its public names."""
    path = f"lora_jax.{name}".rstrip(".")
    module = MODULES.get(name, lj)
    text = pydoc.render_doc(path, renderer=pydoc.plaintext)
    summary = (module.__doc__ or "").splitlines()[0]
    assert summary.endswith(".") and f" - {summary.removesuffix('.')}" in text
    for own in module.__all__:
        assert re.search(rf"\b{own}\b", text), own
