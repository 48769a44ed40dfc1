"""What GPUs and the links between them can do by their makers' data sheets, and clusters of them. TFLOP/s are
dense (without sparsity), GB are decimal, links count one direction."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """bf16, tf32 and fp32 (without tensor cores): TFLOP/s; float8: of e4m3 matrices, None where it multiplies
    none. memory_gib: GiB that torch sees, of which data
    sheets call somewhat more GB. memory_gbs: GB/s. nvlink_gbs, host_gbs: GB/s of one GPU to the others of its
    node, and to the host (PCIe); where there is no NVLink, both are PCIe's."""

    name: str
    bf16: float
    tf32: float
    fp32: float
    memory_gib: float
    memory_gbs: float
    nvlink_gbs: float
    host_gbs: float
    float8: float | None = None


DEVICES = {
    device.name: device
    for device in (
        # NVIDIA A100 data sheet, SXM 80 GB: NVLink 600 GB/s both ways, PCIe 4
        Device("A100", 312, 156, 19.5, 79.1, 2039, 300, 32),
        Device("A100-40GB", 312, 156, 19.5, 39.4, 1555, 300, 32),  # the same, SXM 40 GB
        # NVIDIA H100 data sheet, SXM, half of "with sparsity"; NVLink 900 GB/s both ways, PCIe 5
        Device("H100", 989, 494, 67, 79.1, 3350, 450, 64, 1979),
        Device("H200", 989, 494, 67, 139.8, 4800, 450, 64, 1979),  # NVIDIA H200 data sheet, SXM
        # NVIDIA HGX B200 and DGX B200 data sheets, an eighth of 8 GPUs; NVLink 1.8 TB/s both ways
        Device("B200", 2250, 1100, 75, 178.0, 8000, 900, 64, 4500),
        # AMD Instinct MI300X data sheet: 7 links of 128 GB/s both ways, PCIe 5; its float8 is another format
        # than e4m3 (FNUZ)
        Device("MI300X", 1307, 654, 163.4, 191.5, 5300, 448, 64),
        Device("L40S", 362, 183, 91.6, 44.5, 864, 32, 32, 733),  # NVIDIA L40S data sheet: no NVLink, PCIe 4
        # NVIDIA RTX A6000 data sheet, half of "with sparsity"; its NVLink joins pairs only, so PCIe 4
        Device("A6000", 155, 77, 38.7, 47.5, 768, 32, 32),
        # NVIDIA RTX 6000 Ada data sheet, half of "with sparsity": no NVLink, PCIe 4
        Device("RTX6000Ada", 364, 182, 91.1, 47.4, 960, 32, 32, 728),
        # NVIDIA Ada architecture white paper, bf16 and float8 summed up in fp32: no NVLink, PCIe 4
        Device("RTX4090", 165, 83, 82.6, 23.6, 1008, 32, 32, 330),
    )
}


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs. between_gbs: GB/s of one GPU's network adapter, one direction. host_bytes: memory
    of a node, None where it is not known."""

    device: Device
    nodes: int
    per_node: int
    between_gbs: float
    host_bytes: float | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node
