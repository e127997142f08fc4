"""What a rule declares is what the documents, exports and tests have of it."""

import ast
import pkgutil
import re
import runpy
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import multiopt as mo
from multiopt import rules
from multiopt.rules.rule import FRACTION, Hyperparameter, number
from spec import check_vectors, make_vectors
from tests.cases import CASES, VALUES, WHOLE, options
from tests.histories import EQUAL

ROOT = Path(__file__).parents[2]
RULES = [getattr(rules, name) for name in rules.__all__ if name != "Rule"]

#: What has tests of its own in the place of cases: Muon is close and not equal, and the dimension
#: of a series needs a series.
APART = {(mo.Muon, f.name) for f in fields(mo.Muon)} | {(mo.DCTAdam, "dct_dim")}


def test_the_tables_are_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_rules.py"))
    assert (ROOT / "docs" / "rules.md").read_text(encoding="utf-8") == made["page"]()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == made["readme"]()
    assert (ROOT / "spec" / "README.md").read_text(encoding="utf-8") == made["spec"]()


def test_every_rule_is_public() -> None:
    found = set()
    for module in pkgutil.iter_modules(rules.__path__, "multiopt.rules."):
        # An average is chained to a rule: nobody steps with it alone.
        if module.name == "multiopt.rules.average":
            continue
        public = vars(import_module(module.name))
        found |= {
            name
            for name in public["__all__"]
            if isinstance(public[name], type) and issubclass(public[name], mo.Rule)
        }
    assert sorted(rules.__all__) == sorted(found)
    for name in rules.__all__:
        assert name in mo.__all__
        assert getattr(mo, name) is getattr(rules, name)


def missing_places(rule: type[mo.Rule]) -> list[str]:
    """What is missing of a rule, in the six places that CONTRIBUTING.md names."""
    name, module = rule.__name__, rule.__module__.rpartition(".")[2]
    elementwise = rule.elementwise is True
    places = {
        f"multiopt/rules/{module}.py: the class {name}": rule.__module__
        == f"multiopt.rules.{module}",
        f"multiopt/rules/__init__.py: {name}": getattr(mo, name, None) is rule,
        f"spec/rules/{module}.md: its hyperparameters": has_page(rule),
        f"spec/make_vectors.py: {module}, and spec/vectors/{module}.json": not elementwise
        or (module in make_vectors.CASES and (ROOT / "spec/vectors" / f"{module}.json").exists()),
        f"spec/check_vectors.py: {name} in RULES and ULPS": not elementwise
        or (name in check_vectors.RULES and name in check_vectors.ULPS),
    }
    defaults = {f.name: f.default for f in fields(rule)}
    varied = {
        option
        for case in (*CASES, *WHOLE)
        if case.rule_class is rule
        for option, value in case.arguments.items()
        if value != defaults[option]
    }
    for option in defaults:
        if (rule, option) not in APART:
            known = option in rule.choices or option in VALUES or (rule, option) in VALUES
            places[f"tests/cases.py: a case of {name} with {option}"] = option in varied
            places[f"tests/cases.py: VALUES for {option}"] = known
    return [place for place, there in places.items() if not there]


def has_page(rule: type[mo.Rule]) -> bool:
    """Whether the page of a rule has its hyperparameters, with their defaults, as it has them."""
    path = ROOT / "spec" / "rules" / f"{rule.__module__.rpartition('.')[2]}.md"
    if not path.exists():
        return False
    text = path.read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| ([^|]*) \|[^|]*\| (\w+)[^|]*\|$", text, re.MULTILINE)
    if rule is mo.AdamW:
        # Its page says what it changes in Adam.
        return not listed
    has: list[tuple[str, Any, bool]] = [
        (name, ast.literal_eval(default), word != "no") for name, default, word in listed
    ]
    return has == [(f.name, f.default, f.name in rule.ranges) for f in fields(rule)]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_stands_in_every_place(rule: type[mo.Rule]) -> None:
    assert missing_places(rule) == []


@dataclass(frozen=True)
class Halved(mo.SGD):
    """A rule that stands nowhere."""

    half: Hyperparameter = number(0.5, FRACTION)


def test_what_is_missing_is_listed() -> None:
    places = missing_places(Halved)
    assert [place.partition(":")[0] for place in places[:5]] == [
        "multiopt/rules/test_rules_table.py",
        "multiopt/rules/__init__.py",
        "spec/rules/test_rules_table.md",
        "spec/make_vectors.py",
        "spec/check_vectors.py",
    ]
    assert places[-1] == "tests/cases.py: VALUES for half"
    assert "tests/cases.py: a case of Halved with lr" in places
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## How to add a rule\n")[1]
    table = re.findall(r"^\| (\d) \| `([\w/<>.]+)`", text, re.MULTILINE)
    assert [int(place) for place, _ in table] == list(range(1, 7))
    named = [place.partition(":")[0].replace("test_rules_table", "<rule>") for place in places]
    assert [path for _, path in table] == list(dict.fromkeys(named))


def test_random_histories_have_every_rule() -> None:
    assert set(EQUAL) == {rule for rule in RULES if rule is not mo.Muon}


@pytest.mark.parametrize("rule", EQUAL)
@given(data=st.data())
def test_random_histories_have_every_hyperparameter(
    rule: type[mo.Rule], data: st.DataObject
) -> None:
    drawn = data.draw(options(rule))
    assert drawn.keys() == {f.name for f in fields(rule)}
    rule(**drawn)
