"""Parameters that a module reads although one of its children owns them.

ZeRO-3 gathers a partitioned parameter in a hook before the forward of the module that owns it. A module that
reads a parameter of its child without calling the child would find the partitioned, empty one. For these,
DeepSpeed has `deepspeed.zero.register_external_parameter(module, param)`: the hooks of the reading module
then gather the parameter as well. This file knows which modules need it; `distributed/construction.py`
registers what it names.
"""

from mmseg.models.decode_heads.knet_head import IterativeDecodeHead
from torch import nn

from internseg_ds.models.adapters.timm_backbone import TimmBackbone


def external_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The external parameters of `module` by their names in it; empty for most modules."""
    if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
        # torch's fused function takes the weights of out_proj as arguments
        return {f"out_proj.{name}": param for name, param in module.out_proj.named_parameters()}
    if isinstance(module, IterativeDecodeHead):
        # K-Net's first kernels are the weights of this classifier
        return {
            f"kernel_generate_head.conv_seg.{name}": param
            for name, param in module.kernel_generate_head.conv_seg.named_parameters()
        }
    if isinstance(module, TimmBackbone):
        # of timm's model other methods are called than its forward: tokens and position embeddings
        return {f"model.{name}": param for name, param in module.model.named_parameters(recurse=False)}
    if hasattr(module, "interpolate_pos_encoding") or hasattr(module, "resize_positional_embeddings"):
        # transformers' SigLIP, SigLIP2 and CLIP resize the weights of this embedding
        return {
            f"{name}.{leaf}": param
            for name, child in module.named_children()
            if isinstance(child, nn.Embedding)
            for leaf, param in child.named_parameters()
        }
    return {}
