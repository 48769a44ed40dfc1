"""The keys of a config that are read here, and those that mmcv and mmseg read and that have no effect
here."""

from internseg_ds.config.lr_schedule import arguments, policies

SECTIONS = (
    "model",
    "data",
    "optimizer",
    "lr_config",
    "runner",
    "evaluation",
    "checkpoint_config",
    "log_config",
    "optimizer_config",
    "engine",
)
OPTIONAL = SECTIONS[5:]
"""Sections that a config may leave out."""

REPLACED = {
    "deepspeed": "every run here is a DeepSpeed run",
    "deepspeed_config": "the ds_config is given on the command line",
    "custom_hooks": "there are no hooks; precision is the engine's, and an average of the weights "
    "(EMAHook) is engine.ema",
    "dist_params": "nccl on GPUs, gloo on CPUs",
    "workflow": "training and evaluation alternate as `evaluation.interval` says",
    "opencv_num_threads": "data workers use one OpenCV thread each",
    "mp_start_method": "data workers are forked",
    "find_unused_parameters": "ZeRO needs no such setting",
    "device": "the device is the accelerator, where there is one",
    "gpu_ids": "processes are the launcher's",
    "fp16": "there is no fp16; the ds_config and engine.backbone_dtype say the precision",
    "momentum_config": "only the learning rate is scheduled",
    "omp_num_threads": "set OMP_NUM_THREADS in the environment",
    "mkl_num_threads": "set MKL_NUM_THREADS in the environment",
}
"""Keys of mmcv's runner that have no effect here, and why."""
RUN = ("work_dir", "seed", "load_from", "resume_from", "auto_resume", "log_level", "cudnn_benchmark")
"""Single settings at the top of a config."""
READ = (*SECTIONS, *RUN, *REPLACED)
"""All that is read of a file; the rest are variables of its own."""
ELSEWHERE = ("custom_imports", "total_iters", "total_epochs")
"""What mmcv and mmseg read at the top of a config while they load it, or read long ago."""

KNOWN: dict[str, tuple[str, ...]] = {
    "data": ("samples_per_gpu", "workers_per_gpu", "train", "val", "test", "train_dataloader"),
    "data.train_dataloader": ("samples_per_gpu", "workers_per_gpu"),
    "evaluation": ("interval", "metric", "save_best", "by_epoch", "pre_eval"),
    "checkpoint_config": ("interval", "max_keep_ckpts", "by_epoch"),
    "optimizer_config": ("grad_clip", "cumulative_iters", "type"),
    "optimizer_config.grad_clip": ("max_norm", "norm_type"),
    "lr_config": ("policy", *sorted(set().union(*map(arguments, policies())))),
    "log_config": ("interval", "hooks"),
    "runner": ("type", "max_iters", "max_epochs"),
    "model.test_cfg": ("mode", "crop_size", "stride", "batch_size"),
    "model.train_cfg": (),
    "engine.tune": ("last_blocks", "lora"),
    "engine.tune.lora": ("rank", "alpha", "dropout", "targets"),
}
"""What the engine reads of the sections that configured mmcv's runner, mmseg of `test_cfg`, and what sections of
`engine` hold."""
