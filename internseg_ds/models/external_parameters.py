"""Parameters that a module reads although a child owns them, whose own forward, where ZeRO-3 would gather them, never runs."""

from torch import nn


def external_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Those of `module`, by their names in it: torch's MultiheadAttention reads the weights of its `out_proj`."""
    if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
        return {f"out_proj.{name}": param for name, param in module.out_proj.named_parameters()}
    return {}
