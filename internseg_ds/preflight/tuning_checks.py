"""Whether a forward pass reaches what `engine.tune` trains: adapters whose layers are read but not called, and
blocks behind the last feature map.

In: the segmentor on the meta device, after `choose_trained`. Nothing is computed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from internseg_ds.errors import ConfigError, shortened
from internseg_ds.models.lora import adapters
from internseg_ds.models.repeated_blocks import repeated_blocks
from internseg_ds.models.tuning import LastBlocks, TuningMode


@contextmanager
def calls_of(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Collects the modules that a forward pass inside the `with` block calls."""
    called: set[nn.Module] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in model.modules()
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def check_tuned_parts(model: nn.Module, mode: TuningMode, called: set[nn.Module]) -> None:
    """called: by a forward pass of the segmentor (`calls_of`). Raises ConfigError where it passed by what should
    train."""
    backbone = model.get_submodule("backbone")
    parents = {child: parent for parent in backbone.modules() for child in parent.children()}
    passed_by = [
        name for name, layer in adapters(backbone).items() if layer not in called and parents[layer] in called
    ]
    if passed_by:
        raise ConfigError(
            f"engine.tune.lora: adapters of {shortened(passed_by)} would have no effect, for the modules around "
            "these layers read their weights and do not call them; leave them out of targets"
        )
    names = {module: name for name, module in backbone.named_modules()}
    trained = repeated_blocks(backbone)[-mode.count :] if isinstance(mode, LastBlocks) else []
    if unused := [names[block] for block in trained if block not in called]:
        raise ConfigError(
            f"engine.tune={{'last_blocks': {len(trained)}}} would train {shortened(unused)}, on which no feature "
            "map depends; shorten the backbone (depth), or let out_indices reach its last block"
        )
