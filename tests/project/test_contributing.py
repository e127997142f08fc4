"""What ``CONTRIBUTING.md`` and ``docs/backends.md`` say of the inside is there."""

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from multiopt.backend import Backend, backend_named
from multiopt.engine import Group
from multiopt.layout import Layout
from multiopt.rules import SGD

ROOT = Path(__file__).parents[2]
PAGES = ["CONTRIBUTING.md", "docs/backends.md"]

#: Where a name with dots begins, and names of other things that have dots.
MODULES = ("multiopt", "multiopt_jax", "multiopt_kernels", "multiopt_numpy", "multiopt_torch")
OTHERS = re.compile(r"^(np|rule|opt|array_api_compat)\.|\.(py|md|json|toml)$")

#: What the arguments of engines are.
ARGUMENTS = {"part": "arrays.Part", "arrays": "arrays.Arrays"}


def sections() -> list[tuple[str, str]]:
    """The pages, of ``CONTRIBUTING.md`` the part about the inside."""
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    texts["CONTRIBUTING.md"] = texts["CONTRIBUTING.md"].split("## How a step runs\n")[1]
    return list(texts.items())


def found(dotted: str) -> Any:
    """What a name stands for that begins with a package, or with a module of ``multiopt``."""
    first, *rest = dotted.split(".")
    # ``arrays.spans`` is of an argument, ``arrays.Part`` of a module.
    start = ARGUMENTS.get(first, first) if rest[0].islower() else first
    names = [*start.split("."), *rest]
    if names[0] not in MODULES:
        names = ["multiopt", *names]
    at, thing = 1, import_module(names[0])
    while at < len(names) and hasattr(thing, "__path__"):
        thing = import_module(".".join(names[: at + 1]))
        at += 1
    for name in names[at:]:
        if isinstance(thing, type) and issubclass(thing, Group) and not hasattr(thing, name):
            # An attribute of its objects.
            thing = backend_named("numpy").group(SGD(), Layout("numpy", (), "float32", "cpu"))
        thing = getattr(thing, name)
    return thing


@pytest.mark.parametrize(("page", "text"), sections(), ids=PAGES)
def test_the_names_are_those_of_the_code(page: str, text: str) -> None:
    dotted = re.findall(r"`([a-z_]\w*(?:\.\w+)+)`", text)
    dotted = [name for name in dotted if not OTHERS.search(name)]
    assert len(set(dotted)) >= 10
    for name in dotted:
        try:
            found(name)
        except (ImportError, AttributeError) as error:
            pytest.fail(f"{page} names {name}: {error}")


def rows(text: str) -> list[str]:
    """The rows of the first table of a text."""
    return text[text.index("\n|") :].strip().split("\n\n")[0].splitlines()[2:]


def test_the_columns_are_those_of_a_group() -> None:
    text = dict(sections())["CONTRIBUTING.md"]
    table = rows(text.split("**Columns of a group**")[1])
    listed = [name for row in table for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(listed) == sorted([*Group.FRESH, "numbers"])


def test_the_engines_are_those_that_there_are() -> None:
    text = dict(sections())["CONTRIBUTING.md"]
    table = rows(text.split("**Engines.**")[1])
    listed = {found(re.findall(r"`([\w.]+)`", row)[0]) for row in table}

    def concrete(kind: type) -> set[type]:
        below = [concrete(sub) for sub in kind.__subclasses__() if sub.__module__.startswith("mul")]
        own = set() if getattr(kind, "__abstractmethods__", ()) else {kind}
        return own.union(*below)

    backend_named("numpy")
    assert listed == concrete(Group)


def test_the_questions_are_those_of_a_backend() -> None:
    table = rows(dict(sections())["docs/backends.md"].split("## What a backend is asked\n")[1])
    listed = [name for row in table for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(listed) == sorted(name for name in vars(Backend) if not name.startswith("_"))


def test_the_calls_are_those_of_an_engine() -> None:
    text = dict(sections())["docs/backends.md"].split("## An engine\n")[1]
    listed = {
        name: arguments
        for row in rows(text)
        for name, arguments in re.findall(r"`(\w+)\((.*?)\)`", row.split("|")[1])
    }
    assert listed.keys() == Group.__abstractmethods__
    for name, arguments in listed.items():
        _, *taken = inspect.signature(getattr(Group, name)).parameters
        given = arguments.split(", ")
        assert given == taken or (given[-1] == "..." and given[:-1] == taken[: len(given) - 1])
