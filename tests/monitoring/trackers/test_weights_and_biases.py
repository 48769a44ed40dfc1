import json
import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import wandb

from internseg_ds.errors import ConfigError
from internseg_ds.monitoring.trackers.background import Limits
from internseg_ds.monitoring.trackers.opening import check_trackers, open_trackers
from tests.monitoring.trackers.runs import LittleServer, bad_server, little_server, run_info
from tests.monitoring.trackers.wandb_files import wandb_files
from tests.run_report.runs import evaluation

HOOK = {"type": "MMSegWandbHook", "init_kwargs": {"project": "test"}}
PATIENT = Limits(settle_s=20)


@pytest.fixture(autouse=True)
def setup_anew():
    """wandb reads the environment once in a process."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def pictures_of(folder, name: str) -> list[np.ndarray]:
    import cv2

    paths = sorted((folder / "wandb").glob(f"*run-*/files/media/images/{name}"))
    return [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in paths]


def test_a_run_that_goes_on_is_the_same_run_offline_without_an_account(tmp_path, offline):
    check_trackers([HOOK])
    with open_trackers([HOOK], run_info(tmp_path), score="mIoU", limits=PATIENT) as trackers:
        for step in (1, 2, 4):
            trackers.record(step, {"loss": 1.0 / step})
        trackers.record(4, {"mIoU": 50.0, "IoU.wall": 25.0})
        trackers.evaluation(evaluation(4))
        trackers.record(5, {"loss": 0.2})
    (tmp_path / "train.log").write_text("all that was said")
    with (
        pytest.raises(RuntimeError),
        open_trackers([HOOK], run_info(tmp_path, start=4), score="mIoU") as trackers,
    ):
        trackers.record(5, {"loss": 0.2})
        trackers.record(6, {"loss": 0.1})
        raise RuntimeError("a run that dies")
    first, second = wandb_files(tmp_path)
    assert first.id == second.id == "0123abcd"
    assert [(row, values["step"]) for row, values in first.rows] == [(1, 1), (2, 2), (4, 4), (5, 5)]
    assert [(row, values["loss"]) for row, values in second.rows] == [(5, 0.2), (6, 0.1)]
    assert first.metrics["*"].step_metric == "step" and first.metrics["IoU.*"].options.hidden
    assert first.config["optimizer"] == {"lr": 1e-3} and first.config["ds_config"] == {
        "bf16": {"enabled": True}
    }
    assert "git abc" in first.config["environment"][0]
    assert first.summary["best/mIoU"] == 50.0 and first.summary["best/step"] == 4
    assert (first.exit_code, second.exit_code) == (0, 1)
    assert [path.read_text() for path in tmp_path.glob("wandb/*run-*/files/train.log")] == [
        "all that was said"
    ]


def test_an_evaluation_is_tables_and_masks(tmp_path, offline):
    with open_trackers([HOOK], run_info(tmp_path), score="mIoU", limits=PATIENT) as trackers:
        trackers.record(4, {"mIoU": 50.0})
        trackers.evaluation(evaluation(4))
    ((_, values),) = wandb_files(tmp_path)[0].rows
    assert values["mIoU"] == 50.0  # one row for all of a step
    tables = {
        path.name.split("_")[0]: json.loads(path.read_text())
        for path in tmp_path.glob("wandb/*run-*/files/media/table/evaluation/*.json")
    }
    assert tables["classes"]["columns"] == ["class", "IoU, %", "pixels"]
    assert tables["classes"]["data"][0] == ["wall", 56.25, 100]  # 90 / (90 + 10 + 50 + 10)
    assert tables["confusion"]["data"][:2] == [["wall", "wall", 90], ["tree & bush", "tree & bush", 90]]
    assert sum(pixels for _, _, pixels in tables["confusion"]["data"]) == 300
    record = evaluation(4)
    (image,) = pictures_of(tmp_path, "evaluation/*.png")
    assert (image == record.pictures[0].image).all()
    truth, prediction = record.pictures[0].truth, record.pictures[0].prediction
    masks = pictures_of(tmp_path, "mask/evaluation/*.png")
    expected = [np.where(truth > 2, 255, truth), prediction]
    assert len(masks) == 2
    assert all(any((mask == each).all() for mask in masks) for each in expected)


def test_pictures_are_filled_up_to_one_size_as_wandb_needs_them(tmp_path, offline, caplog):
    record = evaluation(4)
    first = record.pictures[0]
    image, truth, prediction = first.image[:12, :40], first.truth[:12, :40], first.prediction[:12, :40]
    wide = replace(
        first,
        image=np.tile(image, (1, 2, 1))[:, :40],
        truth=np.tile(truth, 2)[:, :40],
        prediction=np.tile(prediction, 2)[:, :40],
    )
    with open_trackers([HOOK], run_info(tmp_path), limits=PATIENT) as trackers:
        trackers.evaluation(replace(record, pictures=[first, wide]))
    images = pictures_of(tmp_path, "evaluation/*.png")
    masks = pictures_of(tmp_path, "mask/evaluation/*.png")
    assert [each.shape[:2] for each in (*images, *masks)] == [(20, 40)] * 6
    (padded,) = [each for each in images if (each[:12] == wide.image).all()]
    assert not padded[12:].any()
    assert any((mask[:12] == wide.prediction).all() and (mask[12:] == 255).all() for mask in masks)
    assert not [line for line in caplog.messages if "sizes do not match" in line]


def test_checkpoints_are_sent_on_request_with_their_scores(tmp_path, offline):
    asked = HOOK | {"log_checkpoint": True, "log_checkpoint_metadata": True, "num_eval_images": 0}
    folder = tmp_path / "checkpoints" / "iter_4"
    folder.mkdir(parents=True)
    (folder / "weights.pt").write_bytes(b"w" * 100)
    with open_trackers([asked], run_info(tmp_path), score="mIoU", limits=PATIENT) as trackers:
        trackers.checkpoint(2, tmp_path / "checkpoints" / "iter_2")  # removed before it could be sent
        trackers.checkpoint(4, folder)
        trackers.record(4, {"mIoU": 50.0})
        trackers.evaluation(evaluation(4))
    (read,) = wandb_files(tmp_path)
    (sent,) = [each for each in read.artifacts if each.type == "model"]
    assert [entry.path for entry in sent.manifest.contents] == ["weights.pt"]
    assert {*sent.aliases} == {"latest", "step_4", "best"}
    assert json.loads(sent.metadata)["mIoU"] == 50
    assert "evaluation/pictures/count" not in read.rows[-1][1]


@pytest.mark.parametrize(
    "kind",
    ["hangs", pytest.param("refuses", marks=pytest.mark.slow), pytest.param("500", marks=pytest.mark.slow)],
)
def test_without_a_server_the_run_is_kept_offline_and_a_step_takes_no_longer(
    tmp_path, monkeypatch, caplog, kind
):
    caplog.set_level("INFO", "internseg_ds")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    hook = HOOK | {"init_kwargs": {"project": "test", "settings": {"init_timeout": 2}}}
    with bad_server(kind) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        check_trackers([hook])
        began, longest = time.monotonic(), 0.0
        with open_trackers([hook], run_info(tmp_path), limits=Limits(settle_s=0.1)) as trackers:
            for step in range(1, 31):
                before = time.monotonic()
                trackers.record(step, {"loss": 1.0})
                longest = max(longest, time.monotonic() - before)
            assert time.monotonic() - began < 1  # long before wandb gives the server up
    assert longest < 0.05
    rows = [row for read in wandb_files(tmp_path) for row, _ in read.rows]
    assert rows == list(range(1, 31))
    assert "is not reached, and the run is kept offline" in caplog.text
    assert "wandb sync --id 0123abcd" in caplog.text


def test_online_no_row_is_lost_when_a_run_goes_back_to_an_earlier_step(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    little = LittleServer()
    with little_server(little):
        monkeypatch.setenv("WANDB_BASE_URL", little.url)
        for start, steps in ((0, (2, 4, 6)), (2, (4, 6, 8, 10))):
            with open_trackers([HOOK], run_info(tmp_path, start=start), limits=PATIENT) as trackers:
                for step in steps:
                    trackers.record(step, {"loss": float(start)})
            wandb.teardown()
    rows = [(row["step"], row["loss"], row["_step"]) for row in little.rows]
    assert [row[:2] for row in rows] == [(2, 0), (4, 0), (6, 0), (4, 2), (6, 2), (8, 2), (10, 2)]
    # the client's own count goes on where it has to, and is that of steps again as soon as it can
    assert [row[2] for row in rows] == [2, 4, 6, 7, 8, 9, 10]
    assert "RunResumeStatus" in little.asked and not list(tmp_path.glob("wandb/offline-*"))


def test_a_server_that_goes_away_holds_up_neither_a_step_nor_the_end(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    hook = HOOK | {"init_kwargs": {"project": "test", "settings": {"finish_timeout": 1}}}
    little, longest = LittleServer(), 0.0
    with ExitStack() as server:
        server.enter_context(little_server(little))
        monkeypatch.setenv("WANDB_BASE_URL", little.url)
        with open_trackers([hook], run_info(tmp_path), limits=PATIENT) as trackers:
            trackers.record(1, {"loss": 1.0})
            trackers.settle()
            server.close()
            for step in range(2, 31):
                before = time.monotonic()
                trackers.record(step, {"loss": 1.0})
                longest = max(longest, time.monotonic() - before)
            trackers.settle()
            ending = time.monotonic()
    assert time.monotonic() - ending < 10 and longest < 0.05
    assert [row for read in wandb_files(tmp_path) for row, _ in read.rows] == list(range(1, 31))


def test_wandb_without_an_account_is_refused_before_the_run(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="WANDB_MODE=offline"):
        check_trackers([{"type": "TextLoggerHook"}, {"type": "WandbLoggerHook"}])


def test_an_argument_that_wandb_does_not_know_is_refused_before_the_run(offline):
    with pytest.raises(ConfigError, match=r"'projekt'.*did you mean 'project'"):
        check_trackers([{"type": "WandbLoggerHook", "init_kwargs": {"projekt": "mine"}}])
