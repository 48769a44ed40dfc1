"""The page of the data doctor in a browser: nothing is asked of the network, nothing goes wrong in it, and it is
readable on a phone."""

import pytest
from PIL import Image

from internseg_ds.data_report.doctor import examine
from internseg_ds.data_report.page import write_page
from tests.browser import watched
from tests.data_report.small_data import TWO, entry, sound, write


@pytest.fixture
def page(experiment, tmp_path):
    """Of data with a wrong number, a copy and a smaller copy in the validation set, and files of long names."""
    sound(tmp_path)
    write(tmp_path, "val", [[0, 1, 7], [1, 1, 0], [0, 0, 1], [0, 1, 1]])
    for name, drawn in (("copied", Image.linear_gradient("L")), ("shrunk", Image.radial_gradient("L"))):
        picture = drawn.convert("RGB").resize((320, 240))
        labels = Image.new("L", picture.size)
        labels.paste(1, (100, 60, 220, 180))
        for split in ("train", "val"):
            picture.save(tmp_path / f"images/{split}/{name}_{'long' * 20}.jpg", quality=95)
            labels.save(tmp_path / f"labels/{split}/{name}_{'long' * 20}.png")
            if name == "shrunk":
                picture, labels = (image.resize((160, 120), 0) for image in (picture, labels))
    given = experiment(
        entry("CustomDataset", tmp_path, "train", **TWO), entry("CustomDataset", tmp_path, "val", **TWO)
    )
    report = examine(given, workers=0)
    assert len(report.duplicates.same) == 1 and len(report.duplicates.alike) == 1
    return write_page(report, given, tmp_path / "page.html")


def test_it_stands_alone_in_a_browser_and_fits_a_phone(page, browser):
    for width in (1280, 390):
        with watched(browser, width) as seen:
            seen.page.goto(page.as_uri())
            assert seen.overflow() <= 0
            assert seen.outside(page.as_uri()) == [] and seen.errors == []
            assert seen.page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
    text = page.read_text()
    assert text.count('class="shown pair"') == 2 and "What scores are computed on" in text


def test_copies_stand_side_by_side(page, browser):
    with watched(browser) as seen:
        seen.page.goto(page.as_uri())
        for pair in seen.page.locator(".pair").all():
            first, second = (image.bounding_box() for image in pair.locator("img").all())
            assert first["y"] == second["y"] and first["x"] + first["width"] < second["x"]
            files = pair.locator("figcaption").all_inner_texts()
            assert ["/images/train/" in files[0], "/images/val/" in files[1]] == [True, True]


def test_a_damaged_image_is_named_in_the_place_of_its_picture(experiment, tmp_path):
    sound(tmp_path)
    for split in ("train", "val"):
        (tmp_path / f"images/{split}/1.jpg").write_bytes(b"no picture")
    given = experiment(
        entry("CustomDataset", tmp_path, "train", **TWO), entry("CustomDataset", tmp_path, "val", **TWO)
    )
    text = write_page(examine(given, workers=0), given, tmp_path / "page.html").read_text()
    assert [text.count(f'wrong">{name}: ') for name in ("1.jpg", "0.jpg")] == [2, 0]
    assert text.count("data:image/png;base64,") == 6
