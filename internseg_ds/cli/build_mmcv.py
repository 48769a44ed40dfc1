"""Compiles mmcv-full against the torch of this environment and installs it; in about a sixth of the time that
pip alone takes.

In: mmcv-full's source release, by pip. Out: a wheel, kept for the next environment with the same torch and
Python, and installed in this one. Nothing here needs mmcv, so this runs before the package can do anything else.

What takes the time is that each of some 70 small C++ files reads torch's headers. Files that can be read one
after the other in one go are therefore joined; not a line of them is changed. Which operators are compiled cannot
be chosen: `import mmcv.ops` asks the compiled module for all of them.
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from internseg_ds import __version__
from internseg_ds.exit_codes import FAILED, USER_ERROR

MMCV = "1.7.2"
SOURCES = "mmcv/ops/csrc/pytorch"
"""Of the source release: its .cpp files, and those of its folder cpu/, are compiled where there is no GPU."""


def missing() -> list[str]:
    """What the build needs and does not find, each with what brings it."""
    lacks = [_torch()]
    if sys.version_info >= (
        3,
        13,
    ):  # its setup.py reads its version out of locals(), which exec() no longer fills
        lacks.append("Python 3.11 or 3.12, for mmcv-full's setup.py fails on 3.13 and newer")
    # torch compiles with c++, setuptools links with what Python was built with; both with CXX where it is set
    asked = os.environ.get("CXX")
    compilers = {asked} if asked else {"c++", sysconfig.get_config_var("CXX") or "c++"}
    if absent := [name for name in sorted(compilers) if shutil.which(shlex.split(name)[0]) is None]:
        lacks.append(
            f"the C++ compiler {' and '.join(absent)}: apt-get install g++, or set CXX to the one that there is"
        )
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.is_file():
        lacks.append(
            f"Python's headers ({headers}): apt-get install python3-dev, or your distribution's package"
        )
    tools = [name for name in ("wheel", "packaging", "ninja") if find_spec(name) is None]
    # setuptools 82 dropped pkg_resources, which mmcv's setup.py imports
    if (_release("setuptools") or (82,)) >= (82,):
        tools.append('"setuptools<82"')
    if tools:
        lacks.append(f"{', '.join(tools)}: {sys.executable} -m pip install {' '.join(tools)}")
    if find_spec("cv2") is None:  # without one, mmcv's wheel asks for opencv-python, which needs libGL
        lacks.append(f"OpenCV: {sys.executable} -m pip install opencv-python-headless")
    if find_spec("pip") is None:
        lacks.append(f"pip in this environment: {sys.executable} -m ensurepip")
    return [lack for lack in lacks if lack]


def _torch() -> str:
    found = _release("torch")
    if found is None:
        return (
            "torch, against which mmcv-full is compiled: pip install torch torchvision first, for your CUDA"
        )
    return (
        "" if (2, 10) <= found < (2, 14) else f"torch 2.10 to 2.13; this environment has {version('torch')}"
    )


def _release(package: str) -> tuple[int, ...] | None:
    """(2, 13) of "2.13.0+cu130"; None where it is not installed."""
    try:
        return tuple(map(int, version(package).split("+")[0].split(".")[:2]))
    except PackageNotFoundError:
        return None


def wheels_folder() -> Path:
    """Where wheels for this torch and this Python are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    python = "cp{}{}".format(*sys.version_info[:2])
    return Path(cache, "internseg_ds", f"wheels-torch{version('torch').split('+')[0]}-{python}")


def kept_wheel(folder: Path) -> Path | None:
    """The wheel of a folder for this Python and this kind of machine."""
    tag = "cp{}{}".format(*sys.version_info[:2])
    return next(iter(sorted(folder.glob(f"mmcv_full-{MMCV}-{tag}-{tag}-*{platform.machine()}.whl"))), None)


def join_sources(source: Path) -> None:
    """Has the C++ files included by three, in which they are compiled together. source: mmcv-full's release,
    unpacked."""
    of_all = sorted(Path(source, SOURCES).glob("*.cpp"))
    on_cpu = sorted(Path(source, SOURCES, "cpu").glob("*.cpp"))
    # operators on rotated boxes have names in common with others; psamask comes last, for it defines `max` as a macro
    apart = [file for file in on_cpu if "rotated" in file.stem] + [
        file for file in on_cpu if file.stem == "psamask"
    ]
    # pybind.cpp takes longest by itself already
    _join([file for file in of_all if file.stem != "pybind"], "joined.cpp")
    _join([file for file in on_cpu if file not in apart], "joined.cpp")
    _join(apart, "joined_apart.cpp")


def _join(files: Sequence[Path], name: str) -> None:
    # in the same folder, for they include others, under names that setup.py does not look for
    renamed = [file.rename(file.with_suffix(".joined.inc")).name for file in files]
    (files[0].parent / name).write_text("".join(f'#include "{file}"\n' for file in renamed))


def build(wheels: Path) -> Path:
    """Compiles a wheel into `wheels`. Raises CalledProcessError where pip or the compiler fails."""
    wheels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mmcv_") as folder:
        work = Path(folder)
        _pip("download", "--no-deps", "--no-binary", "mmcv-full", "-d", folder, f"mmcv-full=={MMCV}")
        with tarfile.open(next(work.glob("mmcv*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        source = next(path for path in work.iterdir() if path.is_dir())
        join_sources(source)
        _pip("wheel", "--no-deps", "--no-cache-dir", "-w", str(work / "built"), str(source))
        built = next((work / "built").glob("*.whl"))
        # whole or not there: others may look at the same time
        partial = shutil.copy(built, wheels / f"{built.name}.{os.getpid()}")
        return Path(partial).replace(wheels / built.name)


def environment() -> dict[str, str]:
    """Of a build. mmcv is to see no GPU, or it compiles CUDA operators too, for which it needs nvcc, and which nothing
    here calls: its setup does so where `torch.cuda.is_available()` or FORCE_CUDA=1."""
    return {
        "MAX_JOBS": str(len(os.sched_getaffinity(0))),
        "CFLAGS": "-g0",
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "FORCE_CUDA": "0",
        "MMCV_WITH_OPS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # ninja's
    }


def _pip(command: str, *words: str) -> None:
    """pip without a build environment of its own, which would have another torch."""
    subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--no-build-isolation", *words],
        env=environment(),
        check=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compiles mmcv-full (its CPU operators) against the torch of this environment, in some minutes, "
        "keeps the wheel, and installs it. A wheel that is there already is installed at once.",
        epilog="example:\n  python -m internseg_ds.cli.build_mmcv",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"internseg_ds {__version__}")
    parser.add_argument(
        "--wheels",
        type=Path,
        metavar="DIR",
        help="where wheels are looked for and kept (default: in ~/.cache)",
    )
    args = parser.parse_args()
    lacks = missing()
    wheels = args.wheels or (wheels_folder() if _release("torch") else None)
    wheel = kept_wheel(wheels) if wheels else None
    if wheels is None or (lacks and wheel is None):
        print("error: mmcv-full cannot be compiled; what is missing:", *lacks, sep="\n  ", file=sys.stderr)
        sys.exit(USER_ERROR)
    try:
        if wheel is None:
            print(
                f"compiling mmcv-full {MMCV}, once for this torch and Python (2 to 5 minutes) ...", flush=True
            )
            wheel = build(wheels)
        _pip("install", str(wheel))
        subprocess.run([sys.executable, "-W", "ignore", "-c", "import mmcv.ops"], check=True)
    except subprocess.CalledProcessError:
        print(
            "error: mmcv-full could not be built or loaded; the reason stands above. What this needs: a C++17 compiler "
            "(g++ 9 or newer), 3 GiB of memory for each of MAX_JOBS compilers, 1 GiB of disk in TMPDIR. Without "
            f"joined files: MMCV_WITH_OPS=1 FORCE_CUDA=0 pip install --no-build-isolation mmcv-full=={MMCV}",
            file=sys.stderr,
        )
        sys.exit(FAILED)
    print(f"mmcv-full {MMCV} is installed, from {wheel}")


if __name__ == "__main__":
    main()
