"""Which parameters Muon updates: the weight matrices of the backbone's repeated blocks.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), and DeepSpeed's
runtime/zero/muon/original_muon.py (`Muon`): hidden weight matrices, while embeddings, the output layer, biases and
gains are trained by Adam. Of a segmentor, the layers that are hidden and alike are those of the blocks.
"""

from torch import nn

from internseg_ds.lora_names import is_factor
from internseg_ds.models.repeated_blocks import repeated_blocks


def block_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The 2-d weights of the layers in the blocks that `model.backbone` repeats; an empty set for a backbone
    without blocks.

    model: a segmentor, whole or on the meta device; ZeRO-3's shards have no shape to go by. Not among them are
    tables (`nn.Embedding`, and what is not called a weight, as relative position biases), kernels of
    convolutions, and the factors of low-rank adapters.
    """
    backbone = model.get_submodule("backbone")
    return {
        param
        for block in repeated_blocks(backbone)
        for layer in block.modules()
        if not isinstance(layer, nn.Embedding)
        for name, param in _named_in(layer)
        if param.dim() == 2
    } - {param for name, param in model.named_parameters() if is_factor(name)}


def _named_in(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights that a layer itself has."""
    return [(name, param) for name, param in layer.named_parameters(recurse=False) if name.endswith("weight")]
