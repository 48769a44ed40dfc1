"""`internseg-train --env`: what a report of a defect should say of the machine and what is installed on it.

In: nothing but this machine. Out: lines, each as soon as it is known. What cannot be imported or asked is a line with
the error; so this file imports nothing that can be broken but where it is tried.
"""

import faulthandler
import importlib
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import internseg_ds
from internseg_ds.errors import reason_of
from internseg_ds.monitoring.installed import git_revision, output_of, version_of

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "deepspeed",
    "mmcv-full",
    "mmsegmentation",
    "mmdet",
    "mmcls",
    "timm",
    "transformers",
    "peft",
    "flash-attn",
    "numpy",
    "opencv-python-headless",
    "opencv-python",
    "setuptools",
    "ninja",
    "wandb",
    "tensorboard",
)
OPTIONAL = ("transformers", "flash_attn")
MODULES = ("torch", "torchvision", "mmcv", "mmcv.ops", "mmseg.models", "deepspeed", "timm", *OPTIONAL)
EXTENSIONS = ("deepspeed_shm_comm", "cpu_adam")
"""What DeepSpeed compiles for us when it is first needed."""
PREFIXES = (
    "INTERNSEG_",
    "DS_",
    "CUDA_",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "PYTORCH_",
    "OMP_",
    "MAX_JOBS",
    "HF_HUB_OFFLINE",
)
"""Of environment variables that change what a run does; none of them holds a secret."""


def print_report() -> None:
    """All of it, on stdout."""
    warnings.simplefilter("ignore")
    faulthandler.enable()  # a broken extension may end the process: what was printed says where
    for part in (_ours, _machine, _packages, _imports, _gpus, _extensions, _variables):
        try:
            for line in part():
                print(line, flush=True)
        except Exception as error:  # of somebody's library: the other parts are wanted all the same
            print(f"{part.__name__.strip('_')}: cannot be told: {reason_of(error)}", flush=True)


def _ours() -> Iterator[str]:
    yield f"internseg_ds {internseg_ds.__version__}{git_revision()} in {Path(internseg_ds.__file__).parent}"
    yield f"python {platform.python_version()} ({sys.executable})"


def _machine() -> Iterator[str]:
    yield f"system: {platform.platform()}"
    info = Path("/proc/cpuinfo")
    models = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.is_file() else ())
        if line.startswith("model name")
    ]
    model = models[0] if models else platform.processor() or platform.machine()
    yield f"CPU: {model}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores may be used"
    import psutil

    memory = psutil.virtual_memory()
    yield f"memory: {memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available"
    for folder in ("/dev/shm", "."):
        usage = psutil.disk_usage(folder)
        where = "the working directory" if folder == "." else folder
        yield f"disk of {where}: {usage.total / 2**30:.1f} GiB, {usage.free / 2**30:.1f} GiB free"


def _packages() -> Iterator[str]:
    found = {name: version_of(name) for name in PACKAGES}
    yield "installed: " + ", ".join(f"{name} {version}" for name, version in found.items() if version)
    if missing := [name for name, version in found.items() if version is None]:
        yield f"not installed: {', '.join(missing)}"


def _imports() -> Iterator[str]:
    wrong = {}
    for name in MODULES:
        if name in OPTIONAL and find_spec(name) is None:
            continue
        if error := _told(lambda name=name: str(importlib.import_module(name) and "")):  # type: ignore[misc]
            wrong[name] = error
    for name, error in wrong.items():
        yield f"import {name}: {error}"
    if not wrong:
        yield "imports: all of the above can be imported"


def _told(ask: Callable[[], str]) -> str:
    """The answer, or what went wrong instead."""
    try:
        return ask()
    except Exception as error:
        return f"FAILS: {reason_of(error)}"


def _gpus() -> Iterator[str]:
    fields = "driver_version,name,memory.total,memory.used,pcie.link.gen.max"
    driver = output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    for place, line in enumerate(driver.splitlines()):
        yield f"nvidia-smi, GPU {place}: driver {line}"
    if not driver:
        yield "nvidia-smi: there is none, or it fails"
    import torch

    yield (
        f"torch.cuda: built for CUDA {torch.version.cuda or 'none'}, cuDNN {torch.backends.cudnn.version()}, "
        f"NCCL {_told(lambda: '.'.join(map(str, torch.cuda.nccl.version())))}"
    )
    if not torch.cuda.is_available():
        yield "torch sees no GPU"
    for place in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(place)
        yield (
            f"torch, GPU {place}: {device.name}, {device.total_memory / 2**30:.1f} GiB, compute capability "
            f"{device.major}.{device.minor}"
        )


def _extensions() -> Iterator[str]:
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    yield f"C++ compiler: {(output_of(*compiler, '--version') or 'none is found').splitlines()[0]}"
    nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc")
    release = output_of(str(nvcc), "--version") or output_of("nvcc", "--version")
    yield f"nvcc: {release.splitlines()[-1] if release else 'none is found'}"
    from internseg_ds.torch_internals import build_was_interrupted, extension_folder

    for name in EXTENSIONS:
        folder = extension_folder(name)
        built = "compiled" if (folder / f"{name}.so").is_file() else "not compiled yet"
        interrupted = ", and a build of it runs or was interrupted" if build_was_interrupted(folder) else ""
        yield f"DeepSpeed's {name}: {built}{interrupted}, in {folder}"
    from mmcv.ops import get_compiler_version, get_compiling_cuda_version

    yield f"mmcv's operators: compiled by {get_compiler_version()}, CUDA {get_compiling_cuda_version()}"


def _variables() -> Iterator[str]:
    started = Path("/proc/self/environ")  # without what this package and others have set since
    given = (
        started.read_text(errors="replace").split("\0")
        if started.is_file()
        else [f"{name}={value}" for name, value in os.environ.items()]
    )
    found = sorted(each for each in given if each.startswith(PREFIXES))
    yield f"variables: {shlex.join(found) or 'none that changes anything'}"
