"""What documents list is what the code takes."""

import inspect
import re
from pathlib import Path

import multiopt as mo
from multiopt import rules
from multiopt.layout import COMPUTE_DTYPE, PARTS_OF

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "spec"
DTYPES = re.compile(r"\b(?:b?float|complex)\d+\b")


def section(page: str, heading: str) -> str:
    """The text of a page from a heading to the next."""
    return (SPEC / page).read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]


def test_the_dtypes_are_those_that_a_step_takes() -> None:
    doc = inspect.getdoc(mo.Optimizer.step)
    assert doc is not None
    (row,) = re.findall(r".* of another dtype than (.*?) \|", section("registry.md", "A step"))
    table = section("arithmetic.md", "Working precision").splitlines()
    texts = {
        "the docstring": doc.split("params: ")[1].split("grads: ")[0],
        "registry.md": row,
        "arithmetic.md": "\n".join(line.split("|")[1] for line in table if line.startswith("|")),
    }
    for where, text in texts.items():
        assert sorted(DTYPES.findall(text)) == sorted([*COMPUTE_DTYPE, *PARTS_OF]), where


def test_the_settings_are_those_of_the_constructor() -> None:
    page = (SPEC / "registry.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(.*?)` \|", page.split("\n## ")[0], re.MULTILINE)
    parameters = inspect.signature(mo.Optimizer).parameters.values()
    assert listed == [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}".replace("'", '"')
        for p in parameters
    ]
    (sentence,) = re.findall(r"All settings except (.*?) are given by keyword", page)
    assert re.findall(r"`(.*?)`", sentence) == [
        p.name for p in parameters if p.kind != p.KEYWORD_ONLY
    ]


def test_no_page_of_an_elementwise_rule_says_that_complex_parameters_are_refused() -> None:
    for rule in (getattr(rules, name) for name in rules.__all__ if name != "Rule"):
        page = SPEC / "rules" / f"{rule.__module__.rpartition('.')[2]}.md"
        lines = page.read_text(encoding="utf-8").splitlines()
        says = [line for line in lines if "complex parameter" in line and "refused" in line]
        assert not (rule.elementwise and says), rule


def test_the_tests_that_documents_name_exist() -> None:
    """As ``test_crash.py::test_one``, and ``::test_other`` of the file that was named last."""
    named = set()
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *SPEC.rglob("*.md")):
        file = ""
        text = page.read_text(encoding="utf-8")
        for path, test in re.findall(r"`(?:tests/)?([\w/]*\btest_\w+\.py)?(?:::(\w+))?`", text):
            file = path or file
            named.add((page.name, file, test))
    named = {one for one in named if one[1:] != ("", "")}
    assert len(named) > 30
    for page_name, file, test in sorted(named):
        path = ROOT / "tests" / file
        assert path.is_file(), f"{page_name} names {file}"
        code = path.read_text(encoding="utf-8")
        assert not test or f"def {test}(" in code, f"{page_name} names {file}::{test}"
