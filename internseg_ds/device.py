"""Which kind of device the processes of this host compute on: a GPU each where there are GPUs, or, with
`INTERNSEG_DEVICE=cpu`, the CPU all the same.

In: the environment. Out: "cuda" or "cpu". An empty CUDA_VISIBLE_DEVICES is no such switch: deepspeed's
launcher puts real devices in its place. DeepSpeed has a switch of its own, DS_ACCELERATOR, which importing
`internseg_ds` sets to the same.
"""

import os
from collections.abc import Mapping
from typing import Literal

import torch

from internseg_ds.errors import ConfigError

VARIABLE = "INTERNSEG_DEVICE"
DeviceType = Literal["cpu", "cuda"]


def device_type(env: Mapping[str, str] = os.environ) -> DeviceType:
    """What `INTERNSEG_DEVICE` asks for ("cpu" or "cuda"); unset, empty or "auto": the CPU where DeepSpeed is
    told so (DS_ACCELERATOR), else a GPU where torch sees one.

    Raises ConfigError for another value, for "cuda" where torch sees no GPU, and where DeepSpeed is told to
    use another accelerator.
    """
    asked = env.get(VARIABLE) or "auto"
    if asked not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"{VARIABLE}={asked!r} of the environment is none of 'auto', 'cpu', 'cuda'")
    deepspeed = env.get("DS_ACCELERATOR", asked)
    if asked != "auto" and deepspeed != asked:
        raise ConfigError(
            f"{VARIABLE}={asked} and DS_ACCELERATOR={deepspeed} of the environment contradict each other; unset "
            "one of them"
        )
    if "cpu" in (asked, deepspeed):
        return "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"{VARIABLE}=cuda, but torch {torch.__version__} sees no GPU; unset it to compute on the CPU"
        )
    return "cuda" if torch.cuda.is_available() else "cpu"
