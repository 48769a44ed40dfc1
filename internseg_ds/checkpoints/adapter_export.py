"""The low-rank adapters of a ZeRO checkpoint alone, as a folder that peft reads: `PeftModel.from_pretrained(
backbone, FOLDER)` gives a backbone without adapters those of the run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from internseg_ds.checkpoints.consolidate import Layout, consolidate
from internseg_ds.checkpoints.merged_checkpoint import lora_settings
from internseg_ds.checkpoints.streaming import Entry
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.errors import CheckpointError
from internseg_ds.lora_names import is_factor, plain_name

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Names that peft expects."""
PREFIX = "base_model.model."
"""Of the names of peft's files, before those in the model."""


def export_adapters(
    source: Path,
    out: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    tag: str | None = None,
    ema: bool = False,
    overwrite: bool = False,
    check: bool = True,
) -> Path:
    """Writes the adapters of a checkpoint to the folder `out`; arguments are those of `consolidate`. Raises
    CheckpointError where it does, and for a checkpoint without adapters."""
    checkpoint = ZeroCheckpoint.open(source, tag, check=check)
    names = [name.removeprefix("backbone.") for name in checkpoint.shapes if is_factor(name)]
    if not names:
        raise CheckpointError(
            f"{checkpoint.path} holds no low-rank adapters; they come with engine.tune=dict(lora=...)"
        )
    if Path(out).suffix:
        raise CheckpointError(f"{out}: adapters are written as a folder, whose name has no ending")
    lora = lora_settings(checkpoint)
    config = {
        "peft_type": "LORA",
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora.get("dropout", 0.0),
        "target_modules": sorted({plain_name(name).removesuffix(".weight") for name in names}),
        "bias": "none",
        "inference_mode": True,
    }
    layout = Layout(
        select=_by_pefts_names,
        files={CONFIG: json.dumps(config, indent=2) + "\n"},
        merged=False,
        single=WEIGHTS,
    )
    return consolidate(
        source, out, dtype=dtype, tag=tag, ema=ema, overwrite=overwrite, check=check, layout=layout
    )


def _by_pefts_names(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """A and B alone, in whose names peft leaves out which adapter they are of."""
    return {
        PREFIX + name.removeprefix("backbone.").replace(".default.", "."): entry
        for name, entry in entries.items()
        if is_factor(name)
    }
