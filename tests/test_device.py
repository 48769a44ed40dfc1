import os
import subprocess

import pytest
import torch

from internseg_ds.config.ds_config import resolve_ds_config
from internseg_ds.device import device_type
from internseg_ds.distributed.process_group import World, rendezvous
from internseg_ds.errors import ConfigError
from internseg_ds.preflight.settings_checks import check_node_local
from tests.conftest import ROOT
from tests.forks import PATH

CHILD = """
import os
from internseg_ds.distributed.process_group import world_from_environment
import torch
from deepspeed.accelerator import get_accelerator
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
device = world_from_environment().device
print("sees", repr(os.environ["CUDA_VISIBLE_DEVICES"]), "takes", device, get_accelerator().device_name())
"""


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """gpus(count): this process takes its machine for one with so many GPUs."""
    monkeypatch.delenv("INTERNSEG_DEVICE")
    monkeypatch.delenv("DS_ACCELERATOR")

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


def test_the_switch_has_the_last_word_over_what_torch_sees(gpus):
    gpus(2)
    assert [device_type({"INTERNSEG_DEVICE": asked}) for asked in ("", "auto", "cuda", "cpu")] == [
        "cuda",
        "cuda",
        "cuda",
        "cpu",
    ]
    assert (
        device_type({"DS_ACCELERATOR": "cpu"}) == "cpu" and device_type({"DS_ACCELERATOR": "cuda"}) == "cuda"
    )
    gpus(0)
    assert [device_type({"INTERNSEG_DEVICE": asked} if asked else {}) for asked in ("", "auto", "cpu")] == [
        "cpu"
    ] * 3


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"INTERNSEG_DEVICE": "gpu"}, "'gpu' of the environment is none of 'auto', 'cpu', 'cuda'"),
        ({"INTERNSEG_DEVICE": "cuda"}, "sees no GPU; unset it"),
        ({"INTERNSEG_DEVICE": "cpu", "DS_ACCELERATOR": "cuda"}, "contradict each other; unset one"),
        ({"INTERNSEG_DEVICE": "cuda", "DS_ACCELERATOR": "cpu"}, "contradict each other; unset one"),
    ],
)
def test_a_switch_that_cannot_be_meant_is_one_sentence(gpus, env, said):
    gpus(0)
    with pytest.raises(ConfigError, match=said):
        device_type(env)


def test_deepspeeds_launcher_gives_devices_back_that_were_hidden_but_not_those_that_the_switch_leaves_alone(
    tmp_path,
):
    """The launcher puts "0" for an empty CUDA_VISIBLE_DEVICES, so that hiding GPUs by it would not keep a run
    off them."""
    env = {
        **os.environ,
        "PATH": PATH,
        "CUDA_VISIBLE_DEVICES": "",
        "INTERNSEG_DEVICE": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    del env["DS_ACCELERATOR"]  # what importing internseg_ds sets
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    done = subprocess.run(
        ["deepspeed", "--num_gpus", "1", script],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "sees '0' takes cpu cpu" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_local_rank_that_deepspeed_reads_is_the_number_of_the_gpu_that_is_taken(gpus):
    env = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    gpus(1)
    alone = World(3, 4, 3, "srun")  # srun --gpus-per-task=1
    assert alone.device == torch.device("cuda", 0) and rendezvous(alone, env)["LOCAL_RANK"] == "0"
    gpus(4)
    for launcher in ("srun", "deepspeed, torchrun", "mpirun"):
        world = World(7, 8, 3, launcher)
        assert world.device == torch.device("cuda", 3) and rendezvous(world, env)["LOCAL_RANK"] == "3"
    gpus(0)
    assert rendezvous(alone, env)["LOCAL_RANK"] == "3"


def test_more_processes_than_gpus_are_refused(gpus):
    gpus(1)
    second = World(1, 2, 1, "deepspeed, torchrun")
    with pytest.raises(ConfigError, match="process 1 of this host"):
        _ = second.device
    assert rendezvous(second, {"MASTER_ADDR": "node1"})["RANK"] == "1"  # it meets the others, to tell them


def test_files_of_node_local_storage_cannot_be_named_where_each_process_sees_one_gpu_alone(gpus):
    raw = {"zero_optimization": {"stage": 1}, "checkpoint": {"use_node_local_storage": True}}
    ds = resolve_ds_config(raw, experiment="exp.py", micro_batch=2, world_size=4, optimizer={"type": "AdamW"})
    gpus(1)
    check_node_local(ds, World(0, 4, 0, "srun"))
    with pytest.raises(ConfigError, match=r"start with --gpus-per-node"):
        check_node_local(ds, World(3, 4, 3, "srun"))
    gpus(4)
    check_node_local(ds, World(3, 4, 3, "srun"))
