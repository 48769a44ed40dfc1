"""The segmentor with timm's own model in the place of `TimmBackbone`, in a bare DeepSpeed loop: what the adapter
costs, with the loop around it, is the difference to ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timing import Timed
from torch import Tensor, nn
from workload import Workload

from contenders.bare_deepspeed import loop, our_segmentor
from internseg_ds.distributed.construction import build_on_meta


class PlainTimm(nn.Module):
    """A timm model and a neck, under the names that they have in `TimmBackbone`."""

    def __init__(self, section: Mapping[str, Any], neck: nn.Module | None) -> None:
        super().__init__()
        self.model: Any = timm.create_model(
            section["model_name"], num_classes=0, dynamic_img_size=True, **section.get("model_args", {})
        )
        self.indices = list(section["out_indices"])
        self.model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        self.neck = neck

    def forward(self, image: Tensor) -> list[Tensor]:
        """image: (b, 3, h, w) -> maps (b, c, h / p, w / p), p the side of a patch."""
        maps = self.model.forward_intermediates(image, indices=self.indices, intermediates_only=True)
        return maps if self.neck is None else self.neck(maps)


def run(workload: Workload, work_dir: Path) -> Timed:
    from internseg_ds.optimization.parameter_groups import parameter_groups

    cfg = workload.experiment
    model: Any = our_segmentor(workload)
    plain = PlainTimm(cfg.model.backbone, model.backbone.neck)
    plain.load_state_dict(model.backbone.state_dict())
    plain.to(next(model.backbone.parameters()))
    model.backbone = plain

    def groups_of(model: nn.Module) -> list[dict[str, Any]]:
        """The groups of `TimmBackbone`'s parameters, of the plain ones of the same names."""
        meta = build_on_meta(cfg.model)
        params = dict(model.named_parameters())
        names = {param: name for name, param in meta.named_parameters()}
        return [
            {**group, "params": [params[names[param]] for param in group["params"]]}
            for group in parameter_groups(meta, cfg.optimizer)
        ]

    return loop(workload, model, groups_of)
