"""Running statistics of plain batch norms, in whole engines on several ranks."""

import torch
import torch.distributed as dist

from internseg_ds.distributed.batch_norms import norms_of_each_rank
from tests.conftest import ROOT
from tests.distributed.ranks import spawn
from tests.small_experiment import small_experiment


def ranks_agree_on_what_they_evaluate_and_save(root, work_dir) -> None:
    from internseg_ds import SegmentorEngine
    from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint

    experiment = small_experiment(
        root,
        "runner.max_iters=3",
        "model.decode_head.norm_cfg.type=BN",
        "model.auxiliary_head.norm_cfg.type=BN",
    )
    with SegmentorEngine(experiment, ROOT / "ds_configs/zero3_bf16.json", work_dir=work_dir) as engine:
        norms = norms_of_each_rank(engine.deepspeed.module)
        assert norms and any("batch norm" in note and "SyncBN" in note for note in engine.plan.notes)
        engine.train()  # its last step is saved and evaluated
        own = torch.cat([norm.running_var for norm in norms])
        everybodys = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(everybodys, own)
        assert torch.equal(*everybodys) and not own.eq(1).any()
        checkpoint = ZeroCheckpoint(work_dir / "checkpoints/iter_3")
        for name, buffer in engine.deepspeed.module.named_buffers():
            if "running" in name:
                assert torch.equal(checkpoint.buffers[name], buffer)


def test_ranks_agree_on_what_they_evaluate_and_save(ade20k, tmp_path):
    spawn(ranks_agree_on_what_they_evaluate_and_save, 2, ade20k, tmp_path / "run")
