"""EXIF orientation: how a camera says that its picture is to be turned. OpenCV turns it while reading, nobody
turns the label map.

In: image files. Out: the orientation, and text for messages.
"""

from collections.abc import Sequence

from PIL import Image

TAG = 0x0112
TURNS = {
    2: "mirrors it",
    3: "turns it by 180 degrees",
    4: "mirrors it upside down",
    5: "mirrors and turns it by 90 degrees",
    6: "turns it by 90 degrees",
    7: "mirrors and turns it by 270 degrees",
    8: "turns it by 270 degrees",
}
"""EXIF's orientations but 1, which leaves the picture as it is (CIPA DC-008, Exif 2.32, 4.6.4)."""
FIX = (
    "write LoadImageFromFile(color_type='color_ignore_orientation') where label maps belong to "
    "the pictures as they are stored"
)


def orientation(file: str) -> int:
    """1 to 8 of an image file, 1 where it says nothing or cannot be read; reads the file's head alone. 1 of a TIFF:
    OpenCV turns it with "color_ignore_orientation" too, and so does Pillow."""
    try:
        with Image.open(file) as image:
            found = 1 if image.format == "TIFF" else image.getexif().get(TAG, 1)
    except Exception:  # no picture, or none that Pillow knows
        return 1
    return found if found in TURNS else 1


def is_square(file: str) -> bool:
    """Whether an image has equal sides, so that a turn by 90 degrees does not show in them."""
    with Image.open(file) as image:
        return image.width == image.height


def turned_against(file: str, labels: Sequence[int], image: Sequence[int]) -> str:
    """The end of a message about a label map of other sides than its image, where the image's EXIF
    orientation explains it; else nothing."""
    if tuple(labels[:2]) == tuple(image[:2])[::-1] and (turn := orientation(file)) >= 5:
        return f". EXIF of {file} {TURNS[turn]}, and its label map is not turned; {FIX}"
    return ""
