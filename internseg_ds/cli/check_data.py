"""Looks at all images and label maps of an experiment, before days are spent on them."""

from typing import NoReturn

from internseg_ds.cli import command_line
from internseg_ds.progress import stage


def _main() -> None:
    parser = command_line.parser(
        "Looks at all images and label maps of an experiment: what is surely wrong with them, or with how the "
        "config reads them, ends with code 2 and says what mends it; what is odd is a warning.",
        "python launch/check_data.py configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py "
        "--page data.html",
    )
    command_line.add_config(parser)
    parser.add_argument("--page", metavar="HTML", help="write one page with histogram and contact sheet")
    parser.add_argument(
        "--sample",
        type=command_line.count,
        metavar="N",
        help="look at N images of each data set, drawn by a fixed seed (default: all)",
    )
    parser.add_argument(
        "--workers", type=command_line.count, metavar="N", help="processes (default: the CPU cores)"
    )
    parser.add_argument(
        "--fix",
        metavar="CONFIG",
        help="write a config that inherits from the given one and sets what mends it; overwrites nothing",
    )
    command_line.add_config_options(parser)
    args = parser.parse_args()
    if args.sample == 0:
        parser.error("--sample 0 looks at nothing")

    import os
    from pathlib import Path

    with stage(f"loading mmseg, reading {args.config}"):
        from internseg_ds.config.experiment import read_experiment
        from internseg_ds.data_report.doctor import examine
        from internseg_ds.data_report.mended_config import write_mended
        from internseg_ds.data_report.page import write_page
        from internseg_ds.errors import DataError
        from internseg_ds.planning.tables import wide_console

        experiment = read_experiment(args.config, args.cfg_options)
    console = wide_console(soft_wrap=True, highlight=False)
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    report = examine(experiment, workers=workers, sample=args.sample)
    for what, found in report.scanned.items():
        console.print(f"{what}: {len(found.looks):,} of {found.total:,} images looked at", markup=False)
    for finding in report.findings:
        sort = "wrong" if finding.wrong else "odd"
        console.print(f"{sort} [{finding.name}] {finding.message}", markup=False)
    if args.page:
        console.print(f"page: {write_page(report, experiment, Path(args.page))}", markup=False)
    if args.fix:
        settings = [setting for finding in report.findings for setting in finding.settings]
        console.print(f"mended: {write_mended(experiment, settings, Path(args.fix))}", markup=False)
    if report.wrong:
        raise DataError(
            f"{len(report.wrong)} of what was found in the data of {args.config} cannot be right: "
            f"{report.wrong[0].message}"
        )


def main() -> NoReturn:
    """The command."""
    command_line.run(_main)


if __name__ == "__main__":
    main()
