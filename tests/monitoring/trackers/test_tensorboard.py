import numpy as np
import pytest

from internseg_ds.monitoring.trackers.opening import open_trackers
from tests.monitoring.trackers.runs import run_info
from tests.run_report.runs import CLASSES, evaluation

HOOKS = [{"type": "TextLoggerHook"}, {"type": "TensorboardLoggerHook"}]


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def text(events, tag: str) -> str:
    return events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()


def test_records_pictures_and_settings_of_a_run_that_goes_on(tmp_path):
    import cv2

    with (
        pytest.raises(RuntimeError),
        open_trackers(HOOKS, run_info(tmp_path), score="mIoU") as trackers,
    ):
        for step in range(1, 8):
            trackers.record(step, {"loss": 8.0 - step})
        trackers.record(4, {"mIoU": 50.0})
        trackers.evaluation(evaluation(4))
        raise RuntimeError("a run that dies")  # what was written must be on disk all the same
    with open_trackers(HOOKS, run_info(tmp_path, start=4)) as trackers:
        for step in (5, 6):
            trackers.record(step, {"loss": 100.0 + step})
    events = read(tmp_path / "tensorboard")
    # steps 5 to 7 of the first start, which its checkpoint does not know, are not shown
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        *((step, 8.0 - step) for step in range(1, 5)),
        (5, 105.0),
        (6, 106.0),
    ]
    assert [(event.step, event.value) for event in events.Scalars("best/mIoU")] == [(4, 50.0)]
    (shown,) = events.Images("validation/<b>one</b>.jpg")
    picture = cv2.imdecode(np.frombuffer(shown.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    record = evaluation(4)
    original, truth = record.pictures[0].image, record.pictures[0].truth
    assert picture.shape == (20, 30 + 4 + 30 + 4 + 30, 3)
    assert (picture[:, :30] == original).all()
    assert (picture[0, 34:64] == original[0]).all()  # no class, no colour
    colour = record.palette[truth[7, 5]][::-1].astype(float)
    assert np.abs(picture[7, 34 + 5] - (0.4 * original[7, 5] + 0.6 * colour)).max() <= 1
    assert events.Images("evaluation/confusion")[0].step == 4
    table = text(events, "evaluation/classes/text_summary")
    assert "| wall | 56.25 | 100 |" in table and len(table.splitlines()) == 2 + len(CLASSES)
    assert '"depth": 3' in text(events, "settings/config/text_summary")
    assert "git abc" in text(events, "settings/run/text_summary")
