"""Parameters that a module reads although a child owns them, whose own forward, where ZeRO-3 would gather them, never runs."""

from mmseg.models.decode_heads.knet_head import IterativeDecodeHead
from torch import nn


def external_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Those of `module`, by their names in it: torch's MultiheadAttention reads the weights of its `out_proj`, K-Net's head takes the weights of a
    classifier for its first kernels."""
    if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
        return {f"out_proj.{name}": param for name, param in module.out_proj.named_parameters()}
    if isinstance(module, IterativeDecodeHead):
        return {
            f"kernel_generate_head.conv_seg.{name}": param
            for name, param in module.kernel_generate_head.conv_seg.named_parameters()
        }
    return {}
