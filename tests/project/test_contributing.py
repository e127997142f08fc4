"""``CONTRIBUTING.md`` and ``docs/backends.md`` describe the code as it is."""

import ast
import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest

import multiopt as mo
from multiopt.backend import Backend, backend_named
from multiopt.engine import Group
from multiopt.layout import Layout
from multiopt.rules import SGD
from multiopt.schedules import InverseTime
from tests.libraries import engine

ROOT = Path(__file__).parents[2]
PAGES = ["CONTRIBUTING.md", "docs/backends.md"]

#: Where a name with dots begins, and names of other things that have dots.
MODULES = ("multiopt", "multiopt_jax", "multiopt_kernels", "multiopt_numpy", "multiopt_torch")
OTHERS = re.compile(r"^(np|rule|opt|array_api_compat)\.|\.(py|md|json|toml)$")

#: The classes of arguments of engines.
ARGUMENTS = {"part": "arrays.Part", "arrays": "arrays.Arrays"}


def sections() -> list[tuple[str, str]]:
    """The pages; of ``CONTRIBUTING.md`` only the part about the inside."""
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    texts["CONTRIBUTING.md"] = texts["CONTRIBUTING.md"].split("## How a step runs\n")[1]
    return list(texts.items())


def found(dotted: str) -> Any:
    """The object behind a dotted name that begins with a package or a module of ``multiopt``."""
    first, *rest = dotted.split(".")
    # ``arrays.spans`` belongs to an argument, ``arrays.Part`` to a module.
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


def cells(row: str) -> list[str]:
    """The cells of a row of a table."""
    return [cell.strip() for cell in row.strip("|").split("|")]


def defined(path: Path) -> set[str]:
    """The functions and classes that a file defines at its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_what_a_stranger_looks_for_stands_where_the_table_says() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = rows(text.split("## Where things stand\n")[1])
    assert len(table) == 11
    for _, file, name in map(cells, table):
        path = ROOT / file.strip("`")
        assert path.is_file(), f"CONTRIBUTING.md names {file}"
        assert name.strip("`") in defined(path), f"{file} does not define {name}"


PAGES_WITH_LINKS = [
    *ROOT.glob("*.md"),
    *(path for folder in ("docs", "spec") for path in (ROOT / folder).rglob("*.md")),
]


def anchors(path: Path) -> set[str]:
    """The anchors that a page has for its headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES_WITH_LINKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^()\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if file.startswith("https://"):
            continue
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


def picture() -> str:
    """The picture of a step."""
    return dict(sections())["CONTRIBUTING.md"].split("```text\n")[1].split("```")[0]


def stops() -> dict[str, list[str]]:
    """The stops of a step, each with the names of the code where it happens."""
    table = map(cells, rows(dict(sections())["CONTRIBUTING.md"].split("```text\n")[1]))
    return {stop: re.findall(r"`([\w.]+)`", where) for stop, _, where in table}


def test_the_picture_has_the_stops_of_the_table() -> None:
    shown = re.findall(r"^  \| (names -> rows)|^  \+-+ ([\w, ]+) -", picture(), re.MULTILINE)
    assert [stop for line in shown for stop in (line[0] or line[1]).split(", ")] == [*stops()][1:]


def concrete(kind: Any) -> set[type]:
    """The classes of engines: those below a class that have all calls."""
    subclasses: list[type] = kind.__subclasses__()
    below = [concrete(sub) for sub in subclasses if sub.__module__.startswith("mul")]
    own = set() if getattr(kind, "__abstractmethods__", ()) else {kind}
    return own.union(*below)


def code_of(dotted: str) -> set[CodeType]:
    """What runs when a function, a class or a call of any engine is used."""
    thing = found(dotted)
    if isinstance(thing, type):
        thing = getattr(thing, "__enter__" if hasattr(thing, "__enter__") else "__init__")
    owners = concrete(Group) if thing is getattr(Group, thing.__name__, None) else ()
    things = [getattr(owner, thing.__name__) for owner in owners] or [thing]
    return {inspect.unwrap(each).__code__ for each in things}


def test_a_step_passes_the_stops_in_the_order_of_the_table() -> None:
    where = {dotted: code_of(dotted) for names in stops().values() for dotted in names}
    opt = mo.Optimizer(
        SGD(lr=InverseTime(1.0)), mo.Clip(norm=1.0, global_norm=1.0), on_nonfinite="raise"
    )
    # Not contiguous: the engine is lent a copy.
    params = {"w": np.zeros(4)[::2]}
    entered: list[CodeType] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            entered.append(frame.f_code)

    sys.setprofile(profile)
    try:
        opt.step(params, {"w": np.ones(2)})
    finally:
        sys.setprofile(None)
    for dotted, code in where.items():
        assert code & {*entered}, f"a step does not call {dotted}"
    first = [
        next(k for k, c in enumerate(entered) if c in where[names[0]]) for names in stops().values()
    ]
    assert first == sorted({*first})


def test_the_groups_of_the_picture_have_their_engines() -> None:
    text = dict(sections())["CONTRIBUTING.md"].split("**Engines.**")[1]
    engines = {name: found(group.strip("`")) for name, group, _ in map(cells, rows(text))}
    groups = re.findall(r"group \d: (\w+), (\w+), (\w+)", picture())
    names = re.findall(r"(\w+) engine", picture())
    assert len(groups) == len(names) == 2
    for (rule, library, dtype), name in zip(groups, names, strict=True):
        backend = backend_named(library.lower())
        with engine("compiled"):
            group = backend.group(getattr(mo, rule)(), Layout(backend.library, (), dtype, "cpu"))
        assert type(group) is engines[name], f"{rule} on {library}"


def test_the_tables_of_the_picture_have_columns_of_a_group() -> None:
    (header,) = re.findall(r"^ +row .*", picture(), re.MULTILINE)
    shown = {*header.split()} - {"row", "slots"}
    assert shown
    assert shown <= {*Group.FRESH, "numbers"}


def test_the_columns_are_those_of_a_group() -> None:
    text = dict(sections())["CONTRIBUTING.md"]
    table = rows(text.split("**Columns of a group**")[1])
    listed = [name for row in table for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(listed) == sorted([*Group.FRESH, "numbers"])


def test_the_engines_are_those_that_there_are() -> None:
    text = dict(sections())["CONTRIBUTING.md"]
    table = rows(text.split("**Engines.**")[1])
    listed = {found(re.findall(r"`([\w.]+)`", row)[0]) for row in table}
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
