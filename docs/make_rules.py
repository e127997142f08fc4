"""Write the tables of rules from the rules' own declarations: ``python docs/make_rules.py``.

It writes ``docs/rules.md`` and the tables in ``README.md`` and ``spec/README.md``.
``tests/rules/test_rules_table.py`` checks that they are up to date.
"""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import optax
import pyro.optim
import torch

import multiopt as mo
from multiopt import rules
from multiopt.backend import backend_named
from multiopt.layout import Layout
from multiopt.reference import ReferenceGroup
from multiopt_kernels.forms import traced_scalars

FILE = Path(__file__).parent / "rules.md"
README = Path(__file__).parent.parent / "README.md"
SPEC = Path(__file__).parent.parent / "spec" / "README.md"

#: The beginning of the table in the README.
HEAD = "| rule | like | options besides `lr` |\n|---|---|---|\n"

INTRODUCTION = """# The rules

This page is generated from the code by `docs/make_rules.py`. Names and defaults are those of
`torch.optim` if it has the rule, and otherwise those of Pyro or of the paper. Every number may also
be a schedule, `step -> number`. The pages under `spec/rules/` give the formulas in the order in
which they are computed, and the differences from other libraries with their reasons.

`weight_decay` is an L2 penalty, added to the gradient, as in torch. With
`decoupled_weight_decay=True` the parameter shrinks by its learning rate times `weight_decay`
instead, as it always does in `AdamW`, `Adafactor`, `Lion` and `Muon`. In `LAMB` the decay is a part
of the direction.

*Runs* is one of four: *compiled*, element by element; *compiled, coefficients by the host*, if a
coefficient needs a function such as `0.96 ** x`, so that results are equal for all libraries on one
machine, but not between machines; *compiled in passes*, with norms of the whole parameter, or
means of its rows and columns, in between, and by the host too if a coefficient needs it; *as a
whole*, each parameter by itself, with the code as it is.

"""


def table() -> str:
    """Return the long table in Markdown."""
    lines = ["| rule | source | options and defaults | also in | runs |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *map(_row, _rules())])


def page() -> str:
    """Return the text of ``docs/rules.md``."""
    return INTRODUCTION + table() + "\n"


def readme() -> str:
    """Return the text of the README with the table replaced."""
    before, after = README.read_text(encoding="utf-8").split(HEAD)
    rest = after[after.index("\n\n") :]
    return before + HEAD + "\n".join(map(_short_row, _rules())) + rest


def spec() -> str:
    """Return the text of ``spec/README.md`` with the list of rules replaced."""
    lines = SPEC.read_text(encoding="utf-8").splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if line.startswith("| [rules/"))
    others = [line for line in lines if not line.startswith("| [rules/")]
    return "".join([*others[:first], *map(_spec_row, _rules()), *others[first:]])


def _rules() -> list[type[mo.Rule]]:
    """All rules, sorted by name."""
    names = sorted(rules.__all__, key=str.casefold)
    return [getattr(rules, name) for name in names if name != "Rule"]


def _short_row(rule: type[mo.Rule]) -> str:
    options = ", ".join(f"`{f.name}`" for f in fields(rule) if f.name != "lr")
    library, name = _peers(rule)[0].split(" ")
    modules = {"torch": "torch.optim", "Pyro": "pyro.optim", "optax": "optax"}
    return f"| `{rule.__name__}` | `{modules[library]}.{name.strip('`')}` | {options} |"


def _spec_row(rule: type[mo.Rule]) -> str:
    page = f"rules/{_page(rule)}"
    summary = inspect.cleandoc(rule.__doc__ or "").splitlines()[0].replace("``", "`").rstrip(".")
    return f"| [{page}]({page}) | {summary} |\n"


def _row(rule: type[mo.Rule]) -> str:
    options = ", ".join(f"`{f.name}={f.default!r}`" for f in fields(rule))
    name = f"[`{rule.__name__}`](../spec/rules/{_page(rule)})"
    return f"| {name} | {_source(rule)} | {options} | {', '.join(_peers(rule))} | {_runs(rule)} |"


def _runs(rule: type[mo.Rule]) -> str:
    if not rule.elementwise:
        group = backend_named("numpy").group(rule(), Layout("numpy", (), "float32", "cpu"))
        if isinstance(group, ReferenceGroup):
            return "as a whole"
    how = "compiled" if rule.elementwise else "compiled in passes"
    return how if traced_scalars(rule()) is not None else f"{how}, coefficients by the host"


def _page(rule: type[mo.Rule]) -> str:
    """The file name of a rule's page, which is named after its module."""
    return f"{rule.__module__.rpartition('.')[2]}.md"


def _source(rule: type[mo.Rule]) -> str:
    """The first source that the docstring of a rule cites."""
    text = " ".join(inspect.cleandoc(rule.__doc__ or "").split())
    # Up to a full stop that ends a sentence: outside of parentheses, before a capital.
    source = re.search(r"Source: ((?:\([^)]*\)|[^(])*?)(?:\.(?= [A-Z]|$)|;)", text)
    if source is None:
        raise ValueError(f"the docstring of {rule.__name__} does not cite a source")
    return source[1].replace("``", "`").replace("|", "\\|")


def _peers(rule: type[mo.Rule]) -> list[str]:
    name = rule.__name__
    peers = [
        f"{library} `{name}`"
        for library, module in (("torch", torch.optim), ("Pyro", pyro.optim))
        if hasattr(module, name)
    ]
    if hasattr(optax, name.lower()):
        peers.append(f"optax `{name.lower()}`")
    return peers


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
    SPEC.write_text(spec(), encoding="utf-8")
