import psutil
import torch

from internseg_ds.distributed.device_memory import device_memory, free_memory
from internseg_ds.distributed.process_group import World


def test_memory_of_a_process_without_a_gpu_is_its_share_of_the_host(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    world = World(size=8, launcher="torchrun")
    assert device_memory(world) == psutil.virtual_memory().total // 4
    assert 0 < free_memory(torch.device("cpu"), 4) < device_memory(world)
