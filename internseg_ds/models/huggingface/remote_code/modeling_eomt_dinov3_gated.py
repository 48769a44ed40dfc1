"""transformers' EoMT on a DINOv3 whose blocks have another activation than the head, as those with gated MLPs have:
`AutoModelForUniversalSegmentation.from_pretrained(FOLDER, trust_remote_code=True)` loads a folder with this file.

It needs torch and transformers alone.
"""

from transformers import EomtDinov3Config, EomtDinov3ForUniversalSegmentation
from transformers.activations import ACT2FN


class EomtDinov3GatedConfig(EomtDinov3Config):
    """hidden_act: of the head. block_act: of the MLPs in the blocks."""

    model_type = "eomt_dinov3_gated"
    block_act: str = "silu"


class EomtDinov3GatedForUniversalSegmentation(EomtDinov3ForUniversalSegmentation):
    """EoMT whose blocks have an activation of their own."""

    config_class = EomtDinov3GatedConfig

    def __init__(self, config: EomtDinov3GatedConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.mlp.act_fn = ACT2FN[config.block_act]
