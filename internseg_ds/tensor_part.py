"""A part of a tensor in a weight file. Models say with it where a file has their parameters, and the code that
reads files takes it; neither loads the other."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One of `parts` equal parts of the tensor `key`, along its first dimension; `index` is from 0."""

    key: str
    index: int
    parts: int
