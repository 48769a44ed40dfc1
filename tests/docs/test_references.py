"""What the documents refer to exists: pages, headings, files of the project, tests by their names, settings of the
engine, options of commands; and every page is on the site."""

import dataclasses
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from internseg_ds.config.engine_options import EngineOptions
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = [
    *sorted(DOCS.glob("*.md")),
    *sorted(ROOT.glob("configs/**/README.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]
FOLDERS = r"(?:launch|tests|benchmarks|internseg_ds|ds_configs|docs|configs)"


@cache
def tokens(page: Path) -> list:
    """The inline parts of a page, all in one list."""
    parsed = MarkdownIt("commonmark").enable("table").parse(page.read_text())
    return [part for token in parsed for part in (token.children or [])]


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings as GitHub makes them: lower case, hyphens for spaces, no other signs."""
    parsed = MarkdownIt("commonmark").parse(page.read_text())
    found: set[str] = set()
    for opening, text in pairwise(parsed):
        if opening.type == "heading_open":
            words = "".join(part.content for part in text.children or [])
            slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
            again = (
                name for number in range(99) if (name := f"{slug}-{number}" if number else slug) not in found
            )
            found.add(next(again))
    return found


def code(page: Path) -> list[str]:
    """The `code` of a page's sentences."""
    return [part.content for part in tokens(page) if part.type == "code_inline"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    targets = [part.attrs.get("href") or part.attrs.get("src") for part in tokens(page)]
    targets = [str(target) for target in targets if target]
    broken = []
    for target in targets:
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_tests_that_are_named_exist(page):
    missing = []
    for name in code(page):
        match = re.fullmatch(rf"({FOLDERS}/[\w./-]+?)(?:::(\w+))?", name)
        if match is None or re.search(
            r"(?!README)[A-Z]{4}|\.\.\.|/mine/|_build", name
        ):  # NAME stands for one, _build is made
            continue
        file, test = ROOT / match[1], match[2]
        if not file.exists() or (test and f"def {test}(" not in file.read_text()):
            missing.append(name)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_of_the_engine_that_are_named_exist(page):
    known = {field.name for field in dataclasses.fields(EngineOptions)}
    named = {
        match[1] for name in code(page) for match in re.finditer(r"(?:^|[\s\"'(])engine\.(\w+)\b(?!\()", name)
    }
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_and_their_names_that_are_named_exist(page):
    names = [name for name in code(page) if re.fullmatch(r"internseg_ds(\.\w+)+(?<!\.json)", name)]
    for name in names:
        *folders, last = name.split(".")
        within = ROOT.joinpath(*folders)
        source = within.with_suffix(".py") if within.with_suffix(".py").exists() else within / "__init__.py"
        is_module = (within / last).is_dir() or (within / f"{last}.py").exists()
        assert is_module or re.search(rf"\b{last}\b", source.read_text()), name


def test_options_in_the_table_of_the_training_command_exist():
    sources = "".join(file.read_text() for file in (ROOT / "internseg_ds/cli").glob("*.py"))
    rows = re.findall(r"^\| `(--.*?) \| ", (DOCS / "training.md").read_text(), re.MULTILINE)
    options = [option for row in rows for option in re.findall(r"--[a-z-]+", row)]
    assert len(options) > 10 and all(f'"{option}"' in sources for option in options)


def test_every_setting_of_the_engine_stands_in_its_table():
    table = set(re.findall(r"^\| `(\w+)` \|", (DOCS / "engine_settings.md").read_text(), re.MULTILINE))
    assert table == {field.name for field in dataclasses.fields(EngineOptions)}


def test_every_ds_config_stands_in_its_table():
    table = set(re.findall(r"^\| `(\w+)`", (DOCS / "ds_configs.md").read_text(), re.MULTILINE))
    assert table == {file.stem for file in (ROOT / "ds_configs").glob("*.json")}


def test_every_page_is_on_the_site_once():
    listed = re.findall(r"^(\w+)$", (DOCS / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")


def test_the_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 65
