"""Settings of heads and losses that mend what disagrees with the data: classes, and the label of no class.

In: the sections `model` and `data.train` of a config. Out: `Setting`s, none where all agree.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmseg.models import LOSSES

from internseg_ds.data.checks.findings import Setting
from internseg_ds.preflight.loss_checks import USUAL, filled_labels


def class_settings(model: Mapping[str, Any], classes: int) -> Iterator[Setting]:
    """As many classes as the data have, for each head that has fewer. More are right: published heads have."""
    for where, head in _sections(model, "model", ("decode_head", "auxiliary_head")):
        if head.get("num_classes", classes) < classes:
            yield Setting(where, "num_classes", classes)


def ignored_settings(model: Mapping[str, Any], train: Any, ignored: Sequence[int]) -> Iterator[Setting]:
    """The data set's `ignore_index` (of `ignored`, where they have one) for each head, loss and step that
    fills up label maps, where those have another, which is no class."""
    if len(set(ignored)) != 1:
        return
    value = ignored[0]
    for where, head in _sections(model, "model", ("decode_head", "auxiliary_head")):
        classes = head.get("num_classes", 0)
        if _is_no_class(value, classes) and head.get("ignore_index", USUAL) != value:
            yield Setting(where, "ignore_index", value)
        for inner, loss in _sections(head, where, ("loss_decode",)):
            own = _own_ignored(loss)
            if own is not None and own != value and _is_no_class(own, classes):
                yield Setting(inner, "ignore_index", value)
        for step, argument, label in filled_labels(train):
            if label != value and _is_no_class(label, classes):
                yield Setting("data.train", argument, value, step=step)


def _is_no_class(label: int, classes: int) -> bool:
    return label == USUAL or not 0 <= label < classes


def _own_ignored(loss: Mapping[str, Any]) -> int | None:
    """The `ignore_index` of a loss that has one beside its head's."""
    kind = LOSSES.get(loss["type"]) if isinstance(loss.get("type"), str) else loss.get("type")
    argument = None if kind is None else inspect.signature(kind).parameters.get("ignore_index")
    own = None if argument is None else loss.get("ignore_index", argument.default)
    return own if isinstance(own, int) else None


def _sections(
    section: Mapping[str, Any], where: str, names: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place in the config, section) of those of `names` that there are, and of each of a list of them."""
    for name in names:
        given = section.get(name)
        if isinstance(given, Mapping):
            yield f"{where}.{name}", given
        elif isinstance(given, (list, tuple)):
            yield from (
                (f"{where}.{name}.{place}", item)
                for place, item in enumerate(given)
                if isinstance(item, Mapping)
            )
