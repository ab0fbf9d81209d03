"""What can be said of the two Dockerfiles without a Docker daemon: what they name exists and is what they say."""

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.specifiers import SpecifierSet

from config import load_config
from paths import REPO_ROOT

FILES = ["Dockerfile", "Dockerfile.cuda"]
IGNORED = (REPO_ROOT / ".dockerignore").read_text(encoding="utf-8").split()
PIN = re.compile(r"[\w.-]+==[\w.]+")


def instructions(file):
    """(word, rest) of each instruction, continued lines joined; comments are left out."""
    lines = (REPO_ROOT / file).read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]


def rest_of(file, word):
    return [rest for found, rest in instructions(file) if found == word]


def excluded(path):
    """Whether a pattern of .dockerignore matches the path or a folder above it; patterns start at the root."""
    parts = path.split("/")
    above = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(
        pattern.removeprefix("**/") == folder.rpartition("/")[2]
        if pattern.startswith("**/")
        else folder.count("/") == pattern.count("/") and fnmatch.fnmatchcase(folder, pattern)
        for pattern in IGNORED
        for folder in above
    )


def sources(file):
    """What COPY takes from the repository; options and the target are left out."""
    for rest in rest_of(file, "COPY"):
        yield from [word for word in rest.split() if not word.startswith("--")][:-1]


def command_of(file):
    """Words that the image runs."""
    (command,) = rest_of(file, "CMD")
    return ast.literal_eval(command)


def pins(*files):
    return {pin for file in files for pin in PIN.findall((REPO_ROOT / file).read_text(encoding="utf-8"))}


@pytest.mark.parametrize(
    ("path", "left_out"),
    [("train.py", False), ("demo/data/x", False), ("data/x", True), (".venv/x", True), ("qwen/__pycache__/x", True)],
)
def test_patterns_of_dockerignore(path, left_out):
    assert excluded(path) == left_out


@pytest.mark.parametrize("file", FILES)
def test_everything_that_is_copied_exists(file):
    found = list(sources(file))
    assert found == ["requirements.txt", "."]  # the requirements first: their layer stays when code changes
    assert all((REPO_ROOT / source).exists() and not excluded(source) for source in found if source != ".")


@pytest.mark.parametrize("file", FILES)
def test_the_pins_are_those_that_were_tested(file):
    assert pins(file) <= pins("requirements.txt", "requirements-dev.txt")
    runs = " ".join(rest_of(file, "RUN"))
    assert "-r requirements.txt" in runs
    for pattern in re.findall(r"grep '([^']+)' requirements\.txt", runs):  # its output is one argument of pip
        lines = (REPO_ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        (line,) = [line for line in lines if re.search(pattern, line)]
        assert PIN.fullmatch(line)


@pytest.mark.parametrize("file", FILES)
def test_the_command_exists_with_its_options(file):
    python, script, *words = command_of(file)
    assert python == "python"
    assert not excluded(script)
    helped = subprocess.run(
        [sys.executable, script, "--help"], cwd=REPO_ROOT, capture_output=True, text=True, check=True
    )
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", helped.stdout)
    load_config("config.yaml", [word for word in words if re.match(r"[\w.]+=", word)])  # raises on an unknown key
    for path in (word for word in words if "/" in word):
        assert (REPO_ROOT / path).exists()
        assert not excluded(path)


def test_the_first_lines_name_what_is_there():
    for file in FILES:
        text = (REPO_ROOT / file).read_text(encoding="utf-8")
        if file != "Dockerfile":
            assert f"docker build -t vqa-cuda -f {file} ." in text
        for target in re.findall(r':(/app/\w+)"', text):  # a folder of the user's, which the image must not hold
            assert excluded(target.removeprefix("/app/"))
        for script in re.findall(r"\b(\w+\.py)\b", text):
            assert (REPO_ROOT / script).is_file()


def test_both_files_agree():
    plain, cuda = ({word: rest_of(file, word) for word in ("WORKDIR", "ENV")} for file in FILES)
    assert plain["WORKDIR"] == cuda["WORKDIR"] == ["/app"]
    assert set(plain["ENV"][0].split()) <= set(cuda["ENV"][0].split())
    assert rest_of("Dockerfile", "EXPOSE") == [f"{load_config('config.yaml').gui.port} 8000"]
    supported = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    version = re.match(r"python:([\d.]+)", rest_of("Dockerfile", "FROM")[0])[1]
    assert version in SpecifierSet(supported)
