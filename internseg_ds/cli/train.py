"""Trains the segmentor of an experiment config under DeepSpeed."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from internseg_ds.cli.loading import loading
from internseg_ds.monitoring.environment_report import print_report
from internseg_ds.monitoring.run_log import begin_log
from internseg_ds.progress import stage
from internseg_ds.training.stop_requests import exit_on_request, exit_stopped

if TYPE_CHECKING:
    from internseg_ds.config.experiment import Experiment


def _steps(text: str) -> int:
    """The type of --profile."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of steps; write --profile 3, and --profile alone at the end of the "
            "command only"
        )
    return int(text)


def _parser() -> argparse.ArgumentParser:
    from internseg_ds.cli import command_line

    parser = command_line.parser(
        "Fine-tunes every parameter of a segmentor under DeepSpeed ZeRO. Start it with deepspeed, "
        "torchrun, srun or mpirun, or as one plain process.",
        "deepspeed --num_gpus 8 launch/train.py "
        "configs/intern_vit_6b/full_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5.py \\\n"
        "      --deepspeed_config ds_configs/zero3_bf16.json",
    )
    command_line.add_config(parser)
    parser.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        default="ds_configs/zero3_bf16.json",
        metavar="JSON",
        help="DeepSpeed JSON: a path, or the name of one that comes with this package, such as zero3_bf16 "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--work-dir",
        type=command_line.given,
        metavar="DIR",
        help="where checkpoints, logs and curves go (default: the config's work_dir, or "
        "work_dirs/NAME_OF_CONFIG)",
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
        help="start anew in a work directory that holds a run, which is moved beside it; without, that is "
        "refused",
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
        help="seconds in which no process gets on, after which all end and name the one that hangs; 0: "
        "wait for ever (default: %(default)g)",
    )
    parser.add_argument(
        "--profile",
        nargs="?",
        type=_steps,
        const=3,
        default=0,
        metavar="STEPS",
        help="record so many steps (3) with torch.profiler into the work directory's profile/: a trace per "
        "rank, and where the time goes",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print parameters, groups and memory, and take no accelerator",
    )
    parser.add_argument(
        "--env",
        action="store_true",
        help="print versions, GPUs, compiled extensions and the like, for the report of a defect; needs no config",
    )
    command_line.add_checksum_option(parser)
    command_line.add_config_options(parser)
    return parser


def _main() -> None:
    from internseg_ds.cli import command_line

    parser = _parser()
    args = parser.parse_args()
    if args.load_from and args.resume not in (None, "auto"):
        parser.error(
            "--load-from and --resume PATH exclude each other; with --resume auto, --load-from is what the "
            "first run starts from"
        )

    with stage(f"loading mmseg, reading {args.config}"):
        from internseg_ds.config.experiment import read_experiment

        experiment = read_experiment(args.config, command_line.settings_of(args))
    if args.dry_run:
        _dry_run(args, experiment)
    else:
        _train(args, experiment)


def _dry_run(args: argparse.Namespace, experiment: "Experiment") -> None:
    """Checks everything, prints what a run would be, and tries one step on the CPU; writes nothing."""
    from internseg_ds.distributed.process_group import world_from_environment
    from internseg_ds.errors import ConfigError
    from internseg_ds.monitoring.run_log import start_logging
    from internseg_ds.planning.tables import wide_console
    from internseg_ds.preflight.dry_run import describe
    from internseg_ds.training.resume.find_checkpoint import checkpoint_to_resume
    from internseg_ds.training.startup import checked_plan
    from internseg_ds.training.trial_step import try_step, why_untried
    from internseg_ds.training.work_dir import check_unused

    world = world_from_environment()
    start_logging(None, level=experiment.logging.level, is_main=world.is_main)
    resume = args.resume or experiment.resume_from
    work_dir = Path(args.work_dir or experiment.work_dir)
    resume_from = checkpoint_to_resume(resume, work_dir, check=experiment.engine.checksums)
    refusal: ConfigError | None = None
    try:
        check_unused(work_dir, resume_from, overwrite=args.overwrite, resumes=resume == "auto")
    except ConfigError as error:  # of a run; a dry run goes on, for it loses nothing
        refusal = error
    plan = checked_plan(
        experiment,
        args.deepspeed_config,
        world,
        validate=not args.no_validate,
        load_from=args.load_from,
        resume_from=resume_from,
    )
    if not world.is_main:
        return
    console = wide_console()
    describe(plan, console)
    plain = {"markup": False, "highlight": False, "soft_wrap": True}  # paths stay in one piece
    if refusal is not None:
        console.print(f"a run would be refused: {refusal}", style="yellow", **plain)
    if (reason := why_untried(plan)) is not None:
        console.print(reason, **plain)
        return
    console.print(
        "trying one step on the CPU (half a minute; minutes where DeepSpeed's extension is not compiled yet) ..."
    )
    console.print(try_step(plan, args.cfg_options), **plain)


def _train(args: argparse.Namespace, experiment: "Experiment") -> None:
    if args.deterministic:
        import torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
        # a kernel without a deterministic form warns
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic = True

    with stage("loading DeepSpeed"):
        import deepspeed  # noqa: F401 - a later part of the start would take these seconds without a word

        from internseg_ds.training.segmentor_engine import SegmentorEngine

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
    if engine.stopped and engine.options.saves:  # without a save there is nothing to go on from
        exit_stopped()


def main() -> NoReturn:
    """The command."""
    if "--env" in sys.argv[1:]:  # before anything is imported that may be broken
        begin_log()
        print_report()
        sys.exit()
    exit_on_request()  # before the next import, which takes seconds
    with loading("torch and mmcv"):
        from internseg_ds.cli import command_line

    command_line.run(_main)


if __name__ == "__main__":
    main()
