"""How masked attention goes away during a training, so that inference needs none.

Source: Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", 2025, section 3.3; that the steps
are these parts of a training follows from the published configs for 3 and 4 blocks, whose numbers are rounded
down.
"""

PHASE = 1 / 6
"""Part of a training in which the share of one block goes from 1 to 0; the first begins after one, the last
ends one before the end."""
POWER = 0.9


def masked_share(progress: float, block: int, blocks: int) -> float:
    """The share of queries that attend to their mask only.

    progress: 0 at the start of a training, 1 at its end. block: from 0; the earlier a block, the earlier it is
    annealed.
    """
    begin = PHASE + (1 - 3 * PHASE) * block / max(1, blocks - 1)
    done = (progress - begin) / PHASE
    return float((1 - min(1.0, max(0.0, done))) ** POWER)
