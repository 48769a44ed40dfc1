"""Writes the page of a run, or one that compares runs, from what lies in their work directories."""

from typing import NoReturn

from internseg_ds.cli import command_line
from internseg_ds.progress import stage


def _main() -> None:
    parser = command_line.parser(
        "Writes report.html of a run, as the training itself does at each evaluation and save; of several runs, a "
        "page that compares them: curves over each other, scores, settings that differ.",
        "python launch/report.py work_dirs/demo",
    )
    parser.add_argument("work_dirs", nargs="+", metavar="WORK_DIR", help="work directory of a training")
    parser.add_argument(
        "--out",
        metavar="HTML",
        help="where to write it (default: WORK_DIR/report.html; of several runs, comparison.html)",
    )
    args = parser.parse_args()

    from pathlib import Path

    with stage("loading torch"):
        from internseg_ds.run_report.page import check_work_dir, write_comparison, write_run_page

    folders = [Path(folder) for folder in args.work_dirs]
    for folder in folders:
        check_work_dir(folder)
    if len(folders) == 1:
        page = write_run_page(folders[0], Path(args.out) if args.out else None)
    else:
        page = write_comparison(folders, Path(args.out or "comparison.html"))
    print(f"report: {page}")


def main() -> NoReturn:
    """The command."""
    command_line.run(_main)


if __name__ == "__main__":
    main()
