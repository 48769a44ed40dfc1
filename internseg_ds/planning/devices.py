"""What GPUs and the links between them can do by their makers' data sheets. TFLOP/s are dense (without sparsity), bytes are decimal, links count one direction."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """bf16 and tf32: TFLOP/s. memory: GB; memory_gbs: GB/s. nvlink_gbs, host_gbs: GB/s of one GPU to the others of its node, and to the host (PCIe)."""

    name: str
    bf16: float
    tf32: float
    memory: float
    memory_gbs: float
    nvlink_gbs: float
    host_gbs: float


DEVICES = {device.name: device for device in (
    Device("A100", 312, 156, 80, 2039, 300, 32),      # NVIDIA A100 data sheet, SXM 80 GB: NVLink 600 GB/s both ways, PCIe 4
    Device("H100", 989, 494, 80, 3350, 450, 64),      # NVIDIA H100 data sheet, SXM: half of the figures "with sparsity"; NVLink 900 GB/s both ways, PCIe 5
    Device("H200", 989, 494, 141, 4800, 450, 64),     # NVIDIA H200 data sheet, SXM
    Device("B200", 2250, 1100, 180, 8000, 900, 64),   # NVIDIA HGX B200 and DGX B200 data sheets, an eighth of 8 GPUs; NVLink 1.8 TB/s both ways
)}
