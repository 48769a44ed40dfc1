"""What a visit is worth to the project: tables for docs/performance.md, and the planner's assumed rates
(`planning.step_time.Assumptions`) fitted to it.

In: lines of results.jsonl. Out: Markdown.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gpu_visit.results import Line
from gpu_visit.table import latest, markdown, number, table
from internseg_ds.planning.step_time import Assumptions


@dataclass(frozen=True)
class Fit:
    """compute: share of the peak TFLOP/s. update: of the bandwidth of the memory that holds the optimizer's
    state; None where the steps do not tell it. error: largest relative difference of a fitted step. steps:
    how many."""

    compute: float
    update: float | None
    error: float
    steps: int


def report(lines: Sequence[Line]) -> str:
    """The tables of each card, and below them what the planner should assume."""
    parts = []
    for card in dict.fromkeys(line["card"] for line in lines):
        own = [line for line in lines if line["card"] == card]
        parts += [markdown(own), rates(latest(own))]
    return "\n".join(parts) if parts else "Nothing was measured.\n"


def rates(lines: Sequence[Line]) -> str:
    """Assumed shares beside those that this card reached, by what they were found from."""
    assumed, rows = Assumptions(), []
    for where, offloaded in (("on the GPU", False), ("offloaded", True)):
        steps = [
            line
            for line in lines
            if line.get("name") == "training step"
            and line["status"] == "measured"
            and "at_peak" in line.get("planned", {})
            and line["planned"]["offloaded"] == offloaded
            and line["settings"]["heads"] == "TF32"
            and line["planned"]["sheet"]
        ]
        for config in dict.fromkeys(line["settings"]["config"] for line in steps):
            fitted = fit([line for line in steps if line["settings"]["config"] == config], assumed)
            if fitted is not None:
                about = (
                    f"{fitted.steps} steps of {config}, optimizer {where}; within {100 * fitted.error:.0f} %"
                )
                rows.append(("compute", assumed.compute, f"{fitted.compute:.3f}", about))
                if fitted.update is not None:
                    rows.append(("link", assumed.link, f"{fitted.update:.3f}", f"the update of {about}"))
    for line in lines:
        planned = line.get("planned", {}).get("gbs")
        if line.get("name") == "bandwidth" and line["status"] == "measured" and planned:
            rows.append(
                (
                    "link",
                    assumed.link,
                    f"{line['figures']['gbs'] / planned:.3f}",
                    f"copies {line['settings']['copy']}",
                )
            )
    if (
        update := next(
            (line for line in lines if line.get("name") == "fused AdamW" and line["status"] == "measured"),
            None,
        )
    ) is not None:
        rows.append(("update, GB/s", "", number(update["figures"]["gbs"]), "fused AdamW alone"))
    if not rows:
        return "## The planner's rates\n\nNothing was measured that they could be fitted to.\n"
    return "## The planner's rates\n\n" + table(("Assumptions", "now", "measured", "from"), rows) + "\n"


def fit(lines: Iterable[Line], assumed: Assumptions) -> Fit | None:
    """Shares under which the planned steps are the measured ones, by least squares of relative errors: step =
    compute / share + update / other share.

    Copies to and from the host are taken at the assumed share. Steps of one kind only (the same parts in the
    same proportion) tell one share; the update then keeps the assumed one.
    """
    rows = [(line["figures"]["step_s"], line["planned"]["at_peak"]) for line in lines]
    if not rows:
        return None
    measured = np.array([step for step, _ in rows])
    compute, update, host = (
        np.array([peak[name] for _, peak in rows]) for name in ("compute_s", "update_s", "host_s")
    )
    rest = measured - host / assumed.link
    parts = np.stack([compute, update], 1) / measured[:, None]
    slow, share = None, None
    if len(rows) > 1 and np.linalg.cond(parts) < 1e3:
        inverse = np.linalg.lstsq(parts, rest / measured, rcond=None)[0]
        if (inverse > 0).all():
            slow, share = inverse
    if slow is None:  # of the update as assumed, or the fit makes no sense
        share = 1 / assumed.link
        slow = float(
            np.sum(compute / measured * (rest - share * update) / measured)
            / np.sum((compute / measured) ** 2)
        )
        if slow <= 0:
            return None
        fitted = slow * compute + share * update + host / assumed.link
        return Fit(1 / slow, None, float(np.max(np.abs(fitted / measured - 1))), len(rows))
    fitted = slow * compute + share * update + host / assumed.link
    return Fit(float(1 / slow), float(1 / share), float(np.max(np.abs(fitted / measured - 1))), len(rows))
