"""What a rule declares is what the documents, exports and tests have of it."""

import ast
import pkgutil
import re
import runpy
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import multiopt as mo
from multiopt import rules
from tests.cases import CASES, WHOLE
from tests.histories import EQUAL, options
from tests.rules.test_exact import OPTIONS

ROOT = Path(__file__).parents[2]
RULES = [getattr(rules, name) for name in rules.__all__ if name != "Rule"]

#: What has tests of its own in the place of cases: Muon is close and not equal, and the dimension
#: of a series needs a series.
APART = {(mo.Muon, f.name) for f in fields(mo.Muon)} | {(mo.DCTAdam, "dct_dim")}


def page_of(rule: type[mo.Rule]) -> Path:
    return ROOT / "spec" / "rules" / f"{rule.__module__.rpartition('.')[2]}.md"


def test_the_tables_are_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_rules.py"))
    assert (ROOT / "docs" / "rules.md").read_text(encoding="utf-8") == made["page"]()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == made["readme"]()


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


@pytest.mark.parametrize("rule", RULES)
def test_its_page_has_its_hyperparameters(rule: type[mo.Rule]) -> None:
    text = page_of(rule).read_text(encoding="utf-8")
    assert f"(rules/{page_of(rule).name})" in (ROOT / "spec/README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| ([^|]*) \|[^|]*\| (\w+)[^|]*\|$", text, re.MULTILINE)
    if rule is mo.AdamW:
        # It is told by what it changes in Adam.
        assert not listed
        return
    has: list[tuple[str, Any, bool]] = [
        (name, ast.literal_eval(default), word != "no") for name, default, word in listed
    ]
    assert has == [(f.name, f.default, f.name in rule.ranges) for f in fields(rule)]


@pytest.mark.parametrize("rule", RULES)
def test_every_hyperparameter_is_varied_by_a_case(rule: type[mo.Rule]) -> None:
    defaults = {f.name: f.default for f in fields(rule)}
    varied = {
        name
        for case in (*CASES, *WHOLE)
        if case.rule_class is rule
        for name, value in case.arguments.items()
        if value != defaults[name]
    }
    assert varied == {name for name in defaults if (rule, name) not in APART}


def test_random_histories_have_every_rule() -> None:
    assert set(EQUAL) == {rule for rule in RULES if rule is not mo.Muon}
    elementwise = {rule.__name__ for rule in EQUAL if rule().elementwise} - {"DCTAdam"}
    assert OPTIONS.keys() == elementwise


@pytest.mark.parametrize("rule", EQUAL)
@given(data=st.data())
def test_random_histories_have_every_hyperparameter(
    rule: type[mo.Rule], data: st.DataObject
) -> None:
    drawn = data.draw(options(rule))
    assert drawn.keys() == {f.name for f in fields(rule)}
    rule(**drawn)
