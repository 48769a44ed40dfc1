"""The page in a browser: the classes under the pointer are `Segmenter`'s, and nothing is asked of other hosts."""

import sys
import threading

import cv2
import numpy as np
import pytest

from internseg_ds.errors import ConfigError
from internseg_ds.evaluation.viewer.page import application, check_gradio
from internseg_ds.evaluation.viewer.server import address_of, listening, server_of
from tests.browser import watched

pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def address(segmenter):
    """Of a page that is being served."""
    with listening("127.0.0.1", 0) as bound:
        server = server_of(application(segmenter, "scenes"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        yield address_of(bound)
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def seen(browser, address):
    with watched(browser) as seen:
        seen.page.goto(address)
        yield seen


def show(seen, file, part="summary"):
    """Drops a file on the page, and waits for what it makes of it: the text of `part`."""
    seen.page.set_input_files("input[type=file]", file)
    found = seen.page.locator(f"#view .{part}", has_text=file.name)
    found.wait_for(state="visible")
    return found.inner_text()


def under(seen, x, y, width, height):
    """(label, x, y, text) that the page says of the pointer on pixel x, y of an image."""
    box = seen.page.locator("#view .photo").bounding_box()
    seen.page.mouse.move(
        box["x"] + (x + 0.5) / width * box["width"], box["y"] + (y + 0.5) / height * box["height"]
    )
    place = seen.page.locator("#view .under")
    return *(int(place.get_attribute(f"data-{name}")) for name in ("label", "x", "y")), place.inner_text()


def one_pixel_of_each(labels):
    """(x, y) of a pixel in the middle of each of the two largest classes."""
    for label in np.argsort(-np.bincount(labels.ravel()))[:2]:
        rows, columns = np.nonzero(labels == label)
        middle = len(rows) // 2
        yield int(columns[middle]), int(rows[middle])


def test_the_class_under_the_pointer_is_the_segmenters(seen, segmenter, ade20k, address):
    file = min((ade20k / "images/validation").glob("*.jpg"))
    expected = segmenter(file)
    show(seen, file)
    height, width = expected.labels.shape
    found = []
    for x, y in one_pixel_of_each(expected.labels):
        label, *place, text = under(seen, x, y, width, height)
        assert place == [x, y] and label == expected.labels[y, x]
        name, score, _ = text.split(" · ")
        assert name == segmenter.classes[label]
        assert float(score.split()[0]) / 100 == pytest.approx(expected.scores[y, x], abs=0.008)
        found.append(label)
    assert found[0] != found[1]
    rows = seen.page.locator("#view tbody tr").all_inner_texts()
    assert len(rows) == len(np.unique(expected.labels))
    share = np.mean(expected.labels == found[0])
    _, name, area, score = rows[0].split("\t")
    assert name == segmenter.classes[found[0]]
    assert float(area.split()[0]) / 100 == pytest.approx(share, abs=0.006)
    mean = expected.scores[expected.labels == found[0]].mean()
    assert float(score.split()[0]) / 100 == pytest.approx(mean, abs=0.006)
    assert seen.outside(address) == [] and seen.errors == []


def test_the_labels_are_painted_in_their_colours_and_one_class_alone_where_its_row_is_pointed_at(
    seen, segmenter, ade20k
):
    file = max((ade20k / "images/validation").glob("*.jpg"))
    expected = segmenter(file)
    show(seen, file)
    pixel = "([x, y]) => [...document.querySelector('#view .tint').getContext('2d').getImageData(x, y, 1, 1).data]"
    first, second = one_pixel_of_each(expected.labels)
    for x, y in (first, second):
        colour = [*segmenter.palette[expected.labels[y, x]], 255]
        assert seen.page.evaluate(pixel, [x, y]) == colour
    seen.page.locator("#view tbody tr").first.hover()
    assert seen.page.evaluate(pixel, list(first))[3] == 255
    assert seen.page.evaluate(pixel, list(second))[3] == 0


def test_what_is_no_image_is_a_sentence_and_the_next_image_is_shown(seen, segmenter, ade20k, tmp_path):
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(b"no picture")
    assert show(seen, damaged, "fault").startswith("damaged.jpg is no picture that can be read")
    assert not seen.page.locator("#view .result").is_visible()
    file = min((ade20k / "images/validation").glob("*.jpg"))
    large = cv2.resize(cv2.imread(str(file)), (1700, 80), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(tmp_path / "large.PNG"), large)
    summary = show(seen, tmp_path / "large.PNG")
    labels = segmenter(tmp_path / "large.PNG").labels
    assert summary.startswith("large.PNG: 1700 x 80 pixels") and summary.endswith("shown at 1600 x 75")
    for x, y in one_pixel_of_each(labels):
        label, near_x, near_y, _ = under(seen, x, y, 1700, 80)
        assert abs(near_x - x) <= 2 and abs(near_y - y) <= 2 and label == labels[near_y, near_x]
    assert seen.errors == []


def test_it_is_readable_on_a_phone(browser, address, ade20k, segmenter):
    file = min((ade20k / "images/validation").glob("*.jpg"))
    with watched(browser, 390, 844) as seen:
        seen.page.goto(address)
        show(seen, file)
        assert seen.overflow() <= 0
        height, width = segmenter(file).labels.shape
        x, y = width - 2, height // 2
        under(seen, x, y, width, height)
        box, frame = (seen.page.locator(f"#view {name}").bounding_box() for name in (".under", ".frame"))
        assert box["x"] + box["width"] <= frame["x"] + frame["width"] + 1


def test_addresses_that_cannot_be_had_and_a_missing_gradio_are_one_error(monkeypatch):
    with listening("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: another program listens there"):
            listening("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1 "):  # of no machine: RFC 5737
        listening("192.0.2.1", 0)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"pip install 'internseg-ds\[show\]'"):
        check_gradio()
