"""What is measured, in the order of what is worth most: each job runs in a process of its own.

A job is a function of one of the modules beside this one, or a script of benchmarks/ that ends with a line of
JSON. Letters are the parts that --parts takes.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpu_visit.results import ROOT

if TYPE_CHECKING:
    from gpu_visit.visit import Visit

PARTS = {
    "a": "GPU tests",
    "b": "ceilings of the card: matrix products, bandwidth",
    "c": "kernels",
    "d": "6 B full tuning",
    "e": "beside a bare DeepSpeed loop",
    "f": "the other recipes",
    "g": "evaluation",
    "h": "loading and saving",
}
VIT = "configs/intern_vit_6b"
FULL = f"{VIT}/full_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5.py"
TINY = "configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py"
TINY_IMAGE = "configs/intern_image_tiny/upernet_intern_image_tiny_112_ade20k.py"
TINY_MASK2FORMER = "configs/intern_image_tiny/mask2former_intern_image_tiny_112_ade20k.py"


@dataclass(frozen=True)
class Job:
    """name: unique. runs: "module.function" in this folder, or "script.py" in benchmarks/. given: its
    arguments; rehearsed: those of a rehearsal on a CPU (a script's are words of its command line). needs:
    modules that must be importable. least_s: with less time it is not begun; most_s: it is ended then."""

    part: str
    name: str
    runs: str
    given: Mapping[str, Any] | Sequence[str] = field(default_factory=dict)
    rehearsed: Mapping[str, Any] | Sequence[str] | None = None
    needs: tuple[str, ...] = ()
    least_s: float = 20
    most_s: float = 180

    @property
    def is_script(self) -> bool:
        return self.runs.endswith(".py")

    @property
    def missing(self) -> str:
        """What this job lacks here, as words; empty where it can run."""
        if self.is_script and not (ROOT / "benchmarks" / self.runs).is_file():
            return f"benchmarks/{self.runs} is not there"
        packages = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"missing: {', '.join(packages)}" if packages else ""

    def arguments(self, rehearse: bool) -> Any:
        return self.rehearsed if rehearse and self.rehearsed is not None else self.given

    def run(self, visit: "Visit") -> None:
        """In this process."""
        given = self.arguments(visit.rehearse)
        if self.is_script:
            from gpu_visit.scripts import run_script

            run_script(visit, self.runs, given)
            return
        module, name = self.runs.split(".")
        function: Callable = getattr(importlib.import_module(f"gpu_visit.{module}"), name)
        function(visit, **given)


ENGINE = (
    "deepspeed",
    "mmcv",
    "mmseg",
    "mmdet",
    "mmcls",
    "scipy",
    "rich",
    "matplotlib",
    "xxhash",
    "safetensors",
)
"""What a training imports."""
SMALL = dict(config=TINY, side_px=112, micro_batches=(2, 1), warmup=1, steps=1, policies=("blocks",))
JOBS: tuple[Job, ...] = (
    Job(
        "d",
        "full tuning",
        "training.full_tuning",
        dict(config=FULL, side_px=504, micro_batches=(2, 4, 8, 1)),
        SMALL,
        ENGINE,
        least_s=60,
        most_s=260,
    ),
    Job("a", "gpu tests", "gpu_tests.run", {}, {}, (*ENGINE, "pytest"), most_s=150),
    Job("b", "ceilings", "ceilings.run", {}, {}, most_s=60),
    Job("c", "kernels", "kernels.run", {}, {}, ("mmcv", "mmseg"), most_s=120),
    Job(
        "c",
        "DCNv3",
        "dcnv3.py",
        ["--size", "h", "--side", "896", "--images", "2", "--rounds", "3"],
        ["--side", "32", "--rounds", "1"],
        ("mmcv",),
        most_s=60,
    ),
    Job(
        "c",
        "deformable attention",
        "deformable_attention.py",
        ["--side", "896", "--heads", "32"],
        ["--side", "64", "--rounds", "1"],
        ("mmcv",),
        most_s=60,
    ),
    Job(
        "d",
        "full tuning, heads in bf16",
        "training.full_tuning",
        dict(config=FULL, side_px=504, micro_batches=(2, 4, 8), heads_dtype="bfloat16"),
        dict(SMALL, heads_dtype="bfloat16", micro_batches=(2,)),
        ENGINE,
        least_s=60,
        most_s=240,
    ),
    Job("e", "bare DeepSpeed", "training.beside_bare_deepspeed", {}, {}, ENGINE, least_s=60, most_s=300),
    Job(
        "f",
        "head tuning",
        "training.recipe",
        dict(
            config=f"{VIT}/head_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5_frozen.py",
            side_px=504,
            micro_batches=(2, 8),
        ),
        dict(SMALL, micro_batches=(2,), options={"model.backbone.freeze_vit": True}),
        ENGINE,
        least_s=45,
        most_s=150,
    ),
    Job(
        "f",
        "linear probe",
        "training.recipe",
        dict(
            config=f"{VIT}/linear_probing/linear_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5_frozen.py",
            side_px=504,
            micro_batches=(2, 8),
        ),
        dict(SMALL, micro_batches=(2,), options={"model.backbone.freeze_vit": True}),
        ENGINE,
        least_s=45,
        most_s=150,
    ),
    Job(
        "f",
        "InternImage-H UPerNet",
        "training.recipe",
        dict(
            config="configs/intern_image/ade20k/upernet_internimage_h_896_160k_ade20k.py",
            side_px=896,
            micro_batches=(2, 4),
        ),
        dict(SMALL, config=TINY_IMAGE, micro_batches=(2,)),
        ENGINE,
        least_s=45,
        most_s=150,
    ),
    Job(
        "f",
        "InternImage-H Mask2Former",
        "training.recipe",
        dict(
            config="configs/intern_image/ade20k/mask2former_internimage_h_896_80k_cocostuff2ade20k_ss.py",
            side_px=896,
            micro_batches=(1, 2),
            cells=4,
        ),
        dict(SMALL, config=TINY_MASK2FORMER, micro_batches=(1,), cells=4),
        ENGINE,
        least_s=45,
        most_s=150,
    ),
    Job(
        "g",
        "evaluation",
        "evaluate.py",
        ["--config", FULL, "--images", "8", "--rounds", "1", "--workers", "4"],
        ["--images", "2", "--rounds", "1"],
        ENGINE,
        least_s=45,
        most_s=240,
    ),
    Job("h", "loading weights", "weights.loading", {}, {}, ENGINE, least_s=45, most_s=180),
    Job("h", "saving", "weights.saving", {}, {}, ENGINE, least_s=60, most_s=240),
)
BY_NAME = {job.name: job for job in JOBS}
