"""``docs/rules.md`` is what ``docs/make_rules.py`` makes of the code."""

import runpy
from pathlib import Path

import multiopt as mo
from multiopt import rules

ROOT = Path(__file__).parent.parent


def test_the_page_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_rules.py"))["page"]()
    assert (ROOT / "docs" / "rules.md").read_text(encoding="utf-8") == made


def test_every_rule_is_public_and_has_its_pages() -> None:
    for name in rules.__all__:
        assert getattr(mo, name) is getattr(rules, name)
        if name != "Rule":
            module = getattr(rules, name).__module__.rpartition(".")[2]
            assert (ROOT / "spec" / "rules" / f"{module}.md").is_file(), name
