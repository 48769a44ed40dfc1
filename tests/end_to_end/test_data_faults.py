import shutil

import pytest

from tests.conftest import TINY, data_options
from tests.end_to_end.conftest import SMALL

OPTIONS = ["runner.max_iters=8", "checkpoint_config.interval=0"]  # 32 places of the stream: all 23 images


@pytest.fixture(scope="module")
def damaged(ade20k, tmp_path_factory):
    """A data set with two training images that are empty files, the first of all among them."""
    root = tmp_path_factory.mktemp("damaged") / "ade"
    shutil.copytree(ade20k, root)
    images = sorted((root / "images" / "training").iterdir())
    for index in (0, 11):
        images[index].write_bytes(b"")
    return root, [images[index].name for index in (0, 11)]


def run(launch, root, work_dir, *options):
    return launch(
        "launch/train.py",
        TINY,
        "--work-dir",
        work_dir,
        "--no-validate",
        "--cfg-options",
        *SMALL,
        *data_options(root),
        *OPTIONS,
        *options,
        check=False,
    )


def test_damaged_images_up_to_the_limit_are_replaced_and_noted(damaged, launch, tmp_path):
    root, names = damaged
    done = run(launch, root, tmp_path, "engine.max_data_faults=2")
    assert done.returncode == 0, done.stderr[-2000:]
    noted = (tmp_path / "data_faults.txt").read_text().splitlines()
    assert len(noted) == 2 and all(any(name in line for line in noted) for name in names)
    log = (tmp_path / "train.log").read_text()
    assert "(2 of at most 2)" in log and all(log.count(name) == 1 for name in names)


def test_one_more_ends_the_run_on_all_ranks_with_one_sentence(damaged, launch, tmp_path):
    root, names = damaged
    done = run(launch, root, tmp_path, "engine.max_data_faults=1")
    assert done.returncode == 2
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (
        any(name in sentence for name in names)
        and "engine.max_data_faults=1" in sentence
        and "Traceback" not in done.stderr
    )


def test_by_default_the_first_one_is_an_error_before_training(damaged, launch, tmp_path):
    root, names = damaged
    done = run(launch, root, tmp_path)
    assert done.returncode == 2
    assert f"data.train: {root}/images/training/{names[0]}" in done.stderr and "copy it again" in done.stderr
