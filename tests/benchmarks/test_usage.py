"""The options in the usage lines of benchmarks, and in the pages that name one, are options that it has."""

import ast
import re
import shlex
from pathlib import Path

from tests.conftest import ROOT
from tests.docs.test_commands import ENDS, lines_of_code
from tests.docs.test_references import PAGES

SCRIPT = re.compile(r"(?:benchmarks/|docs/|docs\.)(\w+)(?:\.py)?$")
OPTION = re.compile(r"--[a-z][\w-]*")


def unknown_options(line: str) -> list[str]:
    """What a line of a shell gives to a script of benchmarks/ or docs/ and its source, with the modules beside it
    that it imports, does not have."""
    found: list[str] = []
    sources = ""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an apostrophe, so it is none
        return found
    for word in words:
        if match := SCRIPT.match(word):
            path = next(
                (p for d in ("benchmarks", "docs") if (p := ROOT / d / f"{match[1]}.py").exists()), None
            )
            sources = sources_of(path) if path else ""
        elif word in ENDS or word.endswith(".py"):
            sources = ""
        elif sources and (option := OPTION.match(word.strip("[]"))) and f'"{option[0]}"' not in sources:
            found.append(f"{option[0]} in: {line.strip()}")
    return found


def sources_of(path: Path) -> str:
    text = path.read_text()
    beside = [
        path.with_name(f"{name}.py") for name in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
    ]
    return text + "".join(other.read_text() for other in beside if other.exists())


def usage_lines(path: Path) -> list[str]:
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    return [line for line in doc.replace("\\\n", " ").splitlines() if "benchmarks/" in line]


def test_options_of_benchmarks_exist():
    lines = [line for path in (ROOT / "benchmarks").glob("*.py") for line in usage_lines(path)]
    lines += [line for page in PAGES for line in lines_of_code(page)]
    assert sum("benchmarks/" in line for line in lines) > 60
    assert not [found for line in lines for found in unknown_options(line)]


def test_an_option_that_is_none_is_found():
    assert unknown_options("python benchmarks/dcnv3.py --rounds 1 [--no-such 1]") and not unknown_options(
        "deepspeed --num_gpus 2 benchmarks/deformable_attention.py --rounds 1 --heads 8"
    )
