"""What documents and workflows say about the repository: the tests, files and commands that they name exist."""

import ast
import functools
import re

import pytest
import yaml

from paths import REPO_ROOT
from tasks import TASKS

TEST_NAME = re.compile(r"tests/[\w/]+\.py(?:::\w+)+")
FAILURES = "docs/what_can_go_wrong"


def named_tests(text):
    return TEST_NAME.findall(text)


@functools.cache
def functions_in(file):
    """`test` and `Class::test` of a file."""
    found = set()
    for node in ast.parse((REPO_ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return {name for name in found if name.rpartition("::")[2].startswith("test_")}


def documents():
    files = [*REPO_ROOT.glob("*.md"), *(REPO_ROOT / "docs").glob("*.md")]
    return sorted(file.relative_to(REPO_ROOT).as_posix() for file in files)


@pytest.mark.parametrize("document", documents())
def test_every_named_test_exists(document):
    for name in named_tests((REPO_ROOT / document).read_text(encoding="utf-8")):
        file, _, test = name.partition("::")
        assert (REPO_ROOT / file).is_file(), f"{document} names {name}: no such file"
        assert test in functions_in(file), f"{document} names {name}: no such test"


def test_both_languages_name_the_same_tests_row_by_row():
    rows = []
    for language in ("", "_zh"):
        lines = (REPO_ROOT / f"{FAILURES}{language}.md").read_text(encoding="utf-8").splitlines()
        rows.append([named_tests(line) for line in lines if line.startswith("| ") and "tests/" in line])
    assert rows[0] == rows[1]
    assert all(rows[0])
    assert len(rows[0]) > 30


def test_a_name_that_does_not_exist_is_found():
    text = "see [`tests/test_docs.py::test_gone`](../tests/test_docs.py) and tests/dataset/test_raw.py::TestA::test_b."
    assert named_tests(text) == ["tests/test_docs.py::test_gone", "tests/dataset/test_raw.py::TestA::test_b"]
    assert "test_gone" not in functions_in("tests/test_docs.py")
    assert "test_every_named_test_exists" in functions_in("tests/test_docs.py")


@pytest.mark.parametrize("document", documents())
def test_links_to_files_of_the_repository_lead_somewhere(document):
    text = (REPO_ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert ((REPO_ROOT / document).parent / target).exists(), f"{document}: link to {target}"


WORKFLOWS = sorted((REPO_ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows_run_our_commands_with_pinned_actions(file):
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"])
            else:
                called = re.fullmatch(r"python tasks\.py (\w+)", step["run"])
                assert called is None or called[1] in TASKS
                assert called is not None or "apt-get" in step["run"]


def test_make_knows_every_task():
    makefile = (REPO_ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split()) == {"help", *TASKS}


def test_every_command_of_the_contributors_page_exists():
    text = (REPO_ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`make (\w+)`", text)) <= {*TASKS, "NAME"}
