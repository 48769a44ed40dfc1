"""What is wrong or odd about data: as a sentence, and as the lines of a config that mend it.

In: what a check has seen. Out: `Finding`s, which a start turns into an error and warnings, and the data doctor
into a list of all of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from internseg_ds.errors import DataError, UserError


@dataclass(frozen=True)
class Setting:
    """`key` = `value` in one place of a config."""

    where: str
    """A section: "data.train", "model.decode_head"."""
    key: str
    value: Any
    step: str = ""
    """The type of the steps of its pipeline that are meant; "" for the section itself."""
    img_dir: str | None = None
    """The data set that is meant, by its folder of images, where several stand in one section; None: each."""

    def __str__(self) -> str:
        if self.step:
            return f"dict(type={self.step!r}, {self.key}={self.value!r}) in {self.where}.pipeline"
        return f"{self.where}.{self.key}={self.value!r}"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (`wrong`), which ends a run, or odd, which is a warning."""

    name: str
    """What it is, in one word with hyphens: the same for every data set."""
    text: str
    """The value, the file, and what to do."""
    wrong: bool = False
    settings: tuple[Setting, ...] = ()
    """What mends it, where settings of the config do."""
    kind: type[UserError] = DataError
    """The error that it is in a start."""

    @property
    def message(self) -> str:
        """The text, and the settings that it did not name."""
        lines = [str(setting) for setting in self.settings if str(setting) not in self.text]
        return self.text + (f"; write {' and '.join(lines)}" if lines else "")


def as_warnings(findings: Iterable[Finding]) -> list[str]:
    """The messages of what is odd. Raises the error of the first finding that is wrong."""
    warnings = []
    for finding in findings:
        if finding.wrong:
            raise finding.kind(finding.message)
        warnings.append(finding.message)
    return warnings
