"""No file but one knows a private name of DeepSpeed, torch or mmcv."""

import ast
from pathlib import Path

import internseg_ds

NAMES = {
    "distributed/zero_internals.py": {
        "_config",
        "_copy_recovery_script",
        "_global_grad_norm",
        "_hp_mapping",
        "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
        "_z3_leaf",
        "bit16_groups",
        "checkpoint_engine",
        "ds_active_sub_modules",
        "ds_id",
        "ds_numel",
        "ds_persist",
        "ds_process_group",
        "ds_secondary_tensor",
        "ds_status",
        "ds_tensor",
        "fp16_groups",
        "fp16_partitioned_groups_flat",
        "fp32_groups_flat_partition",
        "fp32_partitioned_groups_flat",
        "get_param_id",
        "global_samples",
        "global_steps",
        "grad_position",
        "hp_fragment_address",
        "lp_fragment_address",
        "micro_steps",
        "parameter_offload",
        "persistent_parameters",
        "single_partition_of_fp32_groups",
        "update_lp_params",
    },
    "torch_internals.py": {
        "_BatchNorm",
        "_C",
        "_NormBase",
        "_apply",
        "_buffers",
        "_cdata",
        "_checkpoint_offset",
        "_dynamo",
        "_execution_engine",
        "_foreach_copy_",
        "_get_build_directory",
        "_is_mkldnn_bf16_supported",
        "_last_lr",
        "_load_state_dict_pre_hooks",
        "_modules",
        "_non_persistent_buffers_set",
        "_parameters",
        "_python_dispatch",
        "_pytree",
        "_reset_parameters",
        "_scaled_mm",
        "_schema",
        "_step_count",
        "_subclasses",
    },
    "zero_partition.py": {"ds_shape"},
    "nowhere": {"_cfg_dict"},
}
"""Names without a public meaning, of DeepSpeed, torch and mmcv, and the one file that may use them. The names
of fields in DeepSpeed's files (`checkpoints`) are not attributes."""
ROOT = Path(internseg_ds.__file__).parent


def used_names(tree: ast.Module) -> set[str]:
    """Attributes, parts of imported modules, imported names, and what getattr and the like are given."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        ):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("internseg_ds"):
            found |= {*node.module.split("."), *(name.name for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {part for name in node.names for part in name.name.split(".")}
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr", "setattr", "delattr")
            and isinstance(node.args[1], ast.Constant)
        ):
            found.add(node.args[1].value)
    return found


def test_private_names_are_used_in_one_place_only():
    public = {"deepspeed.runtime.checkpoint_engine"}  # a module of that name, with a public class
    for file in ROOT.rglob("*.py"):
        tree = ast.parse(file.read_text())
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.ImportFrom) and node.module in public)
        ]
        for place, names in NAMES.items():
            if file != ROOT / place:
                assert not used_names(tree) & names, file
