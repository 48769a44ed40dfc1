"""Trains the segmentor of an experiment config under DeepSpeed."""

import argparse
import os
from pathlib import Path

from internseg_ds.engine.stopping import exit_on_request, exit_stopped

exit_on_request()  # before the next import, which takes seconds
from internseg_ds.engine import command_line  # noqa: E402


def _steps(text: str) -> int:
    """The type of --profile."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of steps; write --profile 3, and --profile alone at the end of the command only"
        )
    return int(text)


def main() -> None:
    parser = command_line.parser(
        "Fine-tunes every parameter of a segmentor under DeepSpeed ZeRO. Start it with deepspeed, torchrun, srun or mpirun, or as one plain process.",
        "deepspeed --num_gpus 8 launch/train.py configs/intern_vit_6b/full_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5.py \\\n"
        "      --deepspeed_config ds_configs/zero3_bf16.json",
    )
    parser.add_argument("config", help="experiment config (MMSegmentation 0.x format)")
    parser.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        default="ds_configs/zero3_bf16.json",
        metavar="JSON",
        help="DeepSpeed JSON (default: %(default)s)",
    )
    parser.add_argument(
        "--work-dir",
        type=command_line.given,
        metavar="DIR",
        help="where checkpoints, logs and curves go (default: the config's work_dir, or work_dirs/NAME_OF_CONFIG)",
    )
    parser.add_argument(
        "--load-from",
        type=command_line.given,
        metavar="PATH",
        help="start from the weights of a whole segmentor: .pth, .safetensors, or a ZeRO checkpoint",
    )
    parser.add_argument(
        "--resume",
        "--resume-from",
        type=command_line.given,
        metavar="auto|PATH",
        help="go on exactly where a checkpoint stopped; auto: the newest of the work directory, if any",
    )
    parser.add_argument(
        "--auto-resume", action="store_const", const="auto", dest="resume", help="the same as --resume auto"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew in a work directory that holds a run, which is moved beside it; without, that is refused",
    )
    parser.add_argument("--no-validate", action="store_true", help="train without evaluating")
    parser.add_argument(
        "--no-save",
        action="store_true",
        help="write no checkpoint, not at the end nor when asked to stop: for measuring",
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="of data order, augmentation, initial weights and noise (default: the config's seed, or 0)",
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="deterministic GPU kernels where torch has them; slower"
    )
    parser.add_argument(
        "--heartbeat-timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds in which no process gets on, after which all end and name the one that hangs; 0: wait for ever (default: %(default)g)",
    )
    parser.add_argument(
        "--profile",
        nargs="?",
        type=_steps,
        const=3,
        default=0,
        metavar="STEPS",
        help="record so many steps (3) with torch.profiler into the work directory's profile/: a trace per rank, and where the time goes",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print parameters, groups and memory, and take no accelerator",
    )
    command_line.add_checksum_option(parser)
    command_line.add_config_options(parser)
    args = parser.parse_args()
    if args.load_from and args.resume not in (None, "auto"):
        parser.error(
            "--load-from and --resume PATH exclude each other; with --resume auto, --load-from is what the first run starts from"
        )

    from internseg_ds.engine.experiment import read_experiment

    experiment = read_experiment(args.config, command_line.settings_of(args))
    if args.dry_run:
        from rich.console import Console

        from internseg_ds.distributed.process_group import world_from_environment
        from internseg_ds.engine.description import describe
        from internseg_ds.engine.preflight import check
        from internseg_ds.engine.resuming import checkpoint_to_resume
        from internseg_ds.engine.trackers import start_logging
        from internseg_ds.engine.trial_step import try_step
        from internseg_ds.engine.work_dir import check_unused
        from internseg_ds.errors import ConfigError

        world = world_from_environment()
        start_logging(None, level=experiment.log_level, is_main=world.is_main)
        resume, work_dir = args.resume or experiment.resume_from, Path(args.work_dir or experiment.work_dir)
        resume_from = checkpoint_to_resume(resume, work_dir, check=experiment.engine.checksums)
        used = None
        try:
            check_unused(work_dir, resume_from, overwrite=args.overwrite, resumes=resume == "auto")
        except ConfigError as error:  # which costs a dry run nothing
            used = error
        plan = check(
            experiment,
            args.deepspeed_config,
            world,
            validate=not args.no_validate,
            load_from=args.load_from,
            resume_from=resume_from,
        )
        if world.is_main:
            console = Console()
            describe(plan, console)
            if used is not None:
                console.print(
                    f"a run would be refused: {used}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                    style="yellow",
                )
            console.print(
                "trying one step on the CPU (half a minute; minutes where DeepSpeed's extension is not compiled yet) ..."
            )
            console.print(try_step(plan, args.cfg_options), markup=False, highlight=False, soft_wrap=True)
        return
    if args.deterministic:
        import torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
        torch.use_deterministic_algorithms(
            True, warn_only=True
        )  # a kernel without a deterministic form warns
        torch.backends.cudnn.deterministic = True

    from internseg_ds.engine.segmentor_engine import SegmentorEngine

    with SegmentorEngine(
        experiment,
        args.deepspeed_config,
        work_dir=args.work_dir,
        seed=args.seed,
        load_from=args.load_from,
        resume=args.resume,
        validate=not args.no_validate,
        saves=not args.no_save,
        overwrite=args.overwrite,
        heartbeat_timeout=args.heartbeat_timeout,
        profiled_steps=args.profile,
    ) as engine:
        engine.train()
    if engine.stopped and engine.saves:  # without a save there is nothing to go on from
        exit_stopped()


if __name__ == "__main__":
    command_line.run(main)
