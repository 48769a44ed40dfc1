"""Settings of torch's memory allocators that a run with billions of parameters wants, given through the
environment before the allocators read it.

- `expandable_segments:True`: blocks of the GPU's memory grow in place, so that micro-batches of changing
  sizes leave fewer holes.
- `pinned_max_round_threshold_mb`: torch rounds page-locked buffers of the host up to powers of two, to use
  them again for others; offloaded gradients are some large buffers that live as long as the run, for which
  that only takes memory (6 GiB for 6 billion parameters on one GPU).

Needs no torch, which is found but not imported: importing `internseg_ds` calls it, and must be quick.
"""

import os
import re
from collections.abc import Mapping, MutableMapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

THRESHOLD_MB = 64
"""Larger page-locked buffers are as large as they were asked for."""
NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@cache
def _declared() -> str:
    """torch's own declaration of these settings, which its wheels bring; empty in versions that keep it
    elsewhere, and know the older name alone."""
    spec = find_spec("torch")
    folders = spec.submodule_search_locations if spec is not None and spec.submodule_search_locations else []
    headers = [Path(folder, "include/c10/core/AllocatorConfig.h") for folder in folders]
    return "".join(header.read_text(errors="replace") for header in headers if header.is_file())


def allocator_settings(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variable to set, and its value; none where the user has set one of torch's. An unknown setting
    would be an error of torch's, so only those that the installed torch declares."""
    if any(name in env for name in NAMES):
        return {}
    settings = ["expandable_segments:True"]
    if "pinned_max_round_threshold" in _declared():
        settings.append(f"pinned_max_round_threshold_mb:{THRESHOLD_MB}")
    return {NAMES[0] if NAMES[0] in _declared() else NAMES[1]: ",".join(settings)}


def set_allocators(env: MutableMapping[str, str] = os.environ) -> None:
    """Once, before torch takes memory."""
    env.update(allocator_settings(env))


def pinned_bytes(size: int, env: Mapping[str, str] = os.environ) -> int:
    """What torch takes for a page-locked buffer of `size` bytes: a power of two, unless the settings in force
    have a threshold and it is larger."""
    settings = env.get(NAMES[0], env.get(NAMES[1], ""))
    # what is no number torch refuses itself
    threshold = re.search(r"pinned_max_round_threshold_mb:(\d+)(?:,|$)", settings)
    if threshold is not None and size > int(threshold[1]) * 2**20:
        return size
    return 1 << (size - 1).bit_length() if size else 0
