"""Videos, cameras and windows, with OpenCV."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

VIDEO_SUFFIXES = frozenset(
    (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
)
CODEC = "mp4v"
SOFTWARE = "dino_d2 demo.py"  # marks annotated videos, so that they are not used as inputs
# At the end of an MP4: a `free` box, which may contain anything; its length comes first.
MARK = (8 + len(SOFTWARE)).to_bytes(4, "big") + b"free" + SOFTWARE.encode()
USUAL_RATE = 25.0  # if a camera does not say


class VideoError(ValueError):
    """A video cannot be read or written, or there is no window; the message says why."""


def opencv() -> ModuleType:
    """Import OpenCV; raise an ImportError with a hint if it is not installed."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # we report errors ourselves
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    try:
        import cv2
    except ImportError as error:
        raise ImportError("videos and windows need OpenCV: pip install opencv-python") from error
    return cv2


class Video:
    """The frames of a file or camera, (H, W, 3) of uint8 in RGB; iterate once, in a context.

    Args:
        source: a path, or the number of a camera

    Raises:
        VideoError: there is no frame
        ImportError: OpenCV is not installed
    """

    def __init__(self, source: Path | int):
        cv2 = opencv()
        is_camera = isinstance(source, int)
        self.capture = cv2.VideoCapture(source if is_camera else str(source))
        there, self.first = self.capture.read()
        if not there:
            self.capture.release()
            raise VideoError(
                f"camera {source} cannot be read: is it connected, and not in use? others have "
                "other numbers"
                if is_camera
                else f"video '{source}' cannot be read: it is empty, damaged or of a codec that "
                "this OpenCV does not know"
            )
        self.name = f"camera_{source}" if is_camera else str(source)
        self.rate = self.capture.get(cv2.CAP_PROP_FPS) or USUAL_RATE  # frames per second
        self.length = max(0, int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT)))  # 0: unknown
        height, width = self.first.shape[:2]
        self.size = width, height

    def __iter__(self) -> Iterator[np.ndarray]:
        there, frame = True, self.first
        while there:
            yield np.ascontiguousarray(frame[:, :, ::-1])
            there, frame = self.capture.read()

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_: object) -> None:
        self.capture.release()


def is_annotated(path: Path) -> bool:
    """Whether `VideoWriter` has written this video."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(MARK)))
        return file.read() == MARK


class VideoWriter:
    """Writes an MP4, complete even after an error, and marked for `is_annotated`.

    Args:
        path: of the file
        rate: in frames per second
        size: width and height in pixels; of odd ones, the format drops the last column or row

    Raises:
        VideoError: it cannot be written
    """

    def __init__(self, path: Path, rate: float, size: tuple[int, int]):
        cv2 = opencv()
        self.path = path
        self.file = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*CODEC), rate, size)
        if not self.file.isOpened():
            raise VideoError(
                f"'{path}' cannot be written: this OpenCV has no codec {CODEC} for {size[0]} x "
                f"{size[1]} pixels (the wheels of PyPI do: pip install opencv-python)"
            )

    def write(self, picture: Image.Image) -> None:
        self.file.write(np.ascontiguousarray(np.asarray(picture)[:, :, ::-1]))

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.release()
        with self.path.open("ab") as file:
            file.write(MARK)


class Window:
    """Shows pictures until q or Escape is pressed, or the window is closed.

    Raises:
        VideoError: there is no display, or OpenCV has no windows
        ImportError: OpenCV is not installed
    """

    TITLE = "DINO (q ends)"

    def __init__(self):
        self.cv2 = opencv()
        hint = "use --output FOLDER instead of --show"
        # OpenCV would abort the process without a message.
        if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
            raise VideoError(f"there is no display for a window: {hint}")
        try:
            self.cv2.namedWindow(self.TITLE, self.cv2.WINDOW_NORMAL)
        except self.cv2.error as error:
            raise VideoError(
                f"this OpenCV (opencv-python-headless?) has no windows: {hint}"
            ) from error

    def show(self, picture: Image.Image, *, stay: bool) -> bool:
        """Show an RGB picture; returns whether to continue.

        Args:
            picture: RGB
            stay: wait for a key
        """
        self.cv2.imshow(self.TITLE, np.ascontiguousarray(np.asarray(picture)[:, :, ::-1]))
        while True:
            key = self.cv2.waitKey(50 if stay else 1)
            closed = self.cv2.getWindowProperty(self.TITLE, self.cv2.WND_PROP_VISIBLE) < 1
            if closed or key in (ord("q"), 27):
                return False
            if key >= 0 or not stay:
                return True
