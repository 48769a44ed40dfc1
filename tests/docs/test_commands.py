"""Every command of ours that a page names is one that its parser takes, with these options and values."""

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from internseg_ds.errors import ConfigError
from tests.conftest import ROOT
from tests.docs.test_references import PAGES

COMMAND = re.compile(r"(?:\S*launch/(\w+)\.py|internseg-([a-z-]+)|internseg_ds\.cli\.(\w+))")
ENDS = {"|", ";", "&", "&&", "||"}


@cache
def lines_of_code(page: Path) -> list[str]:
    """Lines of a page's blocks without comments, what a backslash continues in one; and its `code`."""
    found: list[str] = []
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        if token.type in ("fence", "code_block") and token.info != "python":
            whole = token.content.replace("\\\n", " ")
            found += [re.sub(r"(^|\s)#\s.*", "", line) for line in whole.splitlines()]
        found += [part.content for part in token.children or [] if part.type == "code_inline"]
    return found


def commands(line: str) -> Iterator[tuple[str, list[str]]]:
    """The module of `internseg_ds.cli` and the arguments of each command in a line of a shell. Without arguments it
    is only named."""
    try:
        words = shlex.split(line)
    except ValueError:  # an apostrophe, so it is none
        return
    for place, word in enumerate(words):
        if match := COMMAND.fullmatch(word):
            name = next(filter(None, match.groups())).replace("-", "_")
            rest = words[place + 1 :]
            end = next((at for at, each in enumerate(rest) if each in ENDS), len(rest))
            arguments = [each for each in arguments_of(rest[:end]) if each]
            if arguments and (ROOT / "internseg_ds/cli" / f"{name}.py").exists():
                yield name, arguments


def arguments_of(words: list[str]) -> Iterator[str]:
    """Without the signs of "and so on", which stand for a value behind an option; N stands for a number."""
    for before, word in zip(["", *words], words):
        if word.strip(".[]") == "":
            yield "X" if before.startswith("--") else ""
        else:
            yield "1" if word == "N" else (word if "=" in word else word.strip("[]")).removesuffix("...")


def options(parser: argparse.ArgumentParser) -> set[str]:
    return set(re.findall(r"--[a-z][\w-]*", parser.format_help()))


class Taken(Exception):
    """The parser takes these arguments."""


@pytest.fixture
def parse(monkeypatch):
    taken = argparse.ArgumentParser.parse_args

    def parse_args(self, *given):
        if "--" in sys.argv or not sys.argv[1].startswith("-"):
            taken(self, *given)
        elif unknown := {option for option in sys.argv if option.startswith("--")} - options(self):
            self.error(f"unrecognized arguments: {unknown}")  # a sentence that names an option alone
        raise Taken

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)

    def parse(name: str, arguments: list[str]) -> None:
        """Raises SystemExit, or ConfigError, for what the command would refuse."""
        module = importlib.import_module(f"internseg_ds.cli.{name}")
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(Taken):
            getattr(module, "_main", module.main)()

    return parse


NAMED = [
    pytest.param(name, arguments, id=f"{page.stem}: {name} {' '.join(arguments)[:60]}")
    for page in PAGES
    for line in lines_of_code(page)
    for name, arguments in commands(line)
    if "--env" not in arguments  # which is answered before anything is parsed
]


def test_commands_are_found():
    assert len(NAMED) > 60 and {"train", "test", "consolidate", "keep_running"} <= {
        each.values[0] for each in NAMED
    }


def test_every_command_is_one_that_its_parser_takes(parse, capsys):
    refused = []
    for named in NAMED:
        try:
            parse(*named.values)
        except (SystemExit, ConfigError) as error:
            refused.append(f"{named.id}: {error} {capsys.readouterr().err}")
    assert not refused


def test_an_option_that_is_none_is_refused(parse):
    ((name, arguments),) = commands(
        "deepspeed --num_gpus 2 launch/train.py CONFIG --deepspeed_config ... --work_dirs x ..."
    )
    assert arguments == ["CONFIG", "--deepspeed_config", "X", "--work_dirs", "x"]
    with pytest.raises(ConfigError, match="unrecognized arguments: --work_dirs x; train --help lists"):
        parse(name, arguments)
