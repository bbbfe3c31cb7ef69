"""Annotates images and videos and collects the results, for `demo.py`."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import demo_video
import numpy as np
from demo_track import Tracker
from demo_video import SOFTWARE, VIDEO_SUFFIXES, Video, VideoError, VideoWriter, Window
from detectron2.structures import Boxes, Instances
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from program import find_files
from tqdm import tqdm

import dino_d2
from dino_d2.data import DatasetError, read_image
from dino_d2.data.coco_writer import to_results
from dino_d2.images import SUFFIXES as IMAGE_SUFFIXES
from dino_d2.names import plural
from dino_d2.progress import progress
from dino_d2.tiles import detect_in_tiles
from dino_d2.visualize import draw_instances

# Small images are enlarged to at most this long side in pixels, so that labels do not hide objects.
ENLARGED_SIDE = 640


class Shot(NamedTuple):
    """An image, or a frame of a video."""

    picture: np.ndarray  # (H, W, 3) of uint8 in RGB
    names: dict  # keys of its detections in the JSON: image_id, file_name and, in videos, frame


def find_inputs(inputs: Sequence[str]) -> tuple[list[Path], list[Path], int]:
    """The images and videos of paths, folders and patterns, each once.

    Images that `demo.py` has drawn are skipped in folders and patterns, and counted.

    Raises:
        FileNotFoundError: a path, folder or pattern has no such file
        ValueError: all files were drawn by `demo.py`
    """
    everything = find_files(inputs, IMAGE_SUFFIXES | VIDEO_SUFFIXES, "--input")
    named = {Path(name) for name in inputs}
    found = [path for path in everything if path in named or not is_annotated(path)]
    if everything and not found:
        raise ValueError(
            f"--input has only images that demo.py has drawn, such as '{everything[0]}':"
            " name a file to use it nevertheless"
        )
    is_video = [path.suffix.lower() in VIDEO_SUFFIXES for path in found]
    images, videos = (
        [path for path, x in zip(found, is_video, strict=True) if x is kind]
        for kind in (False, True)
    )
    return images, videos, len(everything) - len(found)


def is_annotated(path: Path) -> bool:
    """Whether `demo.py` has drawn this image or video, by its content."""
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return demo_video.is_annotated(path)
    if path.suffix.lower() != ".png":
        return False
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except Exception:  # a damaged image may raise anything; reading it will report that
        return False


def save_picture(picture: Image.Image, path: Path) -> None:
    """Save a PNG, marked for `is_annotated`."""
    notes = PngInfo()
    notes.add_text("Software", SOFTWARE)
    picture.save(path, pnginfo=notes)


class Annotator:
    """Detects, draws, and counts.

    Args:
        predictor: the detector
        output: folder for annotated files; None: none are written
        batch_size: images per batch
        categories: the id of each class in `results`; None: no results are kept
        taken: files that annotated ones must not replace, such as the inputs
        window: shows the pictures
        passed_over: number of inputs skipped because `demo.py` drew them
        tiles: size of the tiles to detect in, in pixels; None: in whole images
        track: whether objects in videos get ids
    """

    def __init__(
        self,
        predictor: dino_d2.Predictor,
        *,
        output: Path | None,
        batch_size: int,
        categories: Sequence[int] | None,
        taken: Iterable[Path],
        window: Window | None = None,
        passed_over: int = 0,
        tiles: int | None = None,
        track: bool = False,
    ):
        self.predictor, self.output, self.window = predictor, output, window
        self.passed_over, self.tiles, self.track = passed_over, tiles, track
        self.batch_size, self.categories = batch_size, categories
        self.taken = {path.resolve() for path in taken}
        self.results: list[dict] = []  # of all images, in COCO's format
        self.detections = self.images = self.frames = self.videos = self.left_out = 0

    def run_images(self, paths: list[Path], ids: list[int]) -> bool:
        """Annotate images, skipping unreadable ones; returns whether to continue."""
        shots = self.detect(self.read(paths, ids))
        for shot, instances in progress(shots, "image", total=len(paths)):
            self.images += 1
            save = self.output and self.free_path(shot.names["file_name"], ".png")
            if not self.draw(shot, instances, save and partial(save_picture, path=save)):
                return False
        return True

    def run_video(self, video: Video, first_id: int) -> bool:
        """Annotate a video; returns whether to continue.

        Args:
            video: its frames
            first_id: of its first frame in the results

        Raises:
            VideoError: the annotated video cannot be written
        """
        shots = (
            Shot(picture, {"image_id": first_id + i, "file_name": video.name, "frame": i})
            for i, picture in enumerate(video)
        )
        path = self.output and self.free_path(video.name, ".mp4")
        writer = VideoWriter(path, video.rate, video.size) if path else None
        tracker = Tracker(self.predictor, video.rate) if self.track else None
        found = progress(self.detect(shots, tracker), "frame", total=video.length or None)
        self.videos += 1
        before = self.frames
        with writer or nullcontext():
            for shot, instances in found:
                self.frames += 1
                if not self.draw(shot, instances, writer and writer.write, stay=False):
                    return False
        missing = video.length - (self.frames - before)
        if missing > max(1, video.length // 100):  # some formats only estimate their length
            warn(
                f"video '{video.name}' lacks {missing} of {plural(video.length, 'frame')}: it is "
                "damaged"
            )
        return True

    def read(self, paths: list[Path], ids: list[int]) -> Iterator[Shot]:
        """Read images; unreadable ones are reported and skipped."""
        for path, image_id in zip(paths, ids, strict=True):
            try:
                picture = read_image(str(path), "RGB")
            except DatasetError as error:
                self.leave_out(error)
                continue
            yield Shot(picture, {"image_id": image_id, "file_name": str(path)})

    def detect(
        self, shots: Iterator[Shot], tracker: Tracker | None = None
    ) -> Iterator[tuple[Shot, Instances]]:
        """Detect in batches, count the detections, and keep the results."""
        while batch := list(islice(shots, self.batch_size)):
            pictures = [shot.picture for shot in batch]
            found = self.find(pictures, tracker.lowest if tracker else None)
            found = map(tracker, found) if tracker else found
            for shot, instances in zip(batch, found, strict=True):
                if self.categories:
                    self.results += to_results(
                        shot.names, instances, self.predictor.classes, self.categories
                    )
                self.detections += len(instances)
                yield shot, instances

    def find(self, pictures: list[np.ndarray], threshold: float | None) -> list[Instances]:
        """The detections in whole images, or in their tiles."""
        if not self.tiles:
            return self.predictor(pictures, threshold)
        known = {"size": self.tiles, "batch_size": self.batch_size, "threshold": threshold}
        return [detect_in_tiles(self.predictor, x, **known) for x in pictures]

    def draw(
        self,
        shot: Shot,
        instances: Instances,
        save: Callable[[Image.Image], None] | None,
        *,
        stay: bool = True,
    ) -> bool:
        """Save and show the annotated picture; returns whether to continue.

        Args:
            stay: show an image, enlarged if small, until a key is pressed
        """
        if not save and not self.window:
            return True
        image = Image.fromarray(shot.picture)
        if stay:
            image, instances = enlarge(image, instances)
        picture = draw_instances(image, instances, self.predictor.classes)
        if save:
            save(picture)
        return not self.window or self.window.show(picture, stay=stay)

    def free_path(self, name: str, suffix: str) -> Path:
        """A file named like the input that does not replace an input, an output or a folder."""
        stem = Path(name).stem
        names = (f"{stem}{f'_{i}' if i else ''}{suffix}" for i in count())
        paths = (self.output / name for name in names)
        path = next(x for x in paths if x.resolve() not in self.taken and not x.is_dir())
        self.taken.add(path.resolve())
        return path

    def leave_out(self, error: Exception) -> None:
        self.left_out += 1
        warn(f"{error}; it is left out")

    def summary(self) -> str:
        parts = [plural(self.images, "image")] if self.images or not self.videos else []
        if self.videos:
            parts.append(f"{plural(self.frames, 'frame')} of {plural(self.videos, 'video')}")
        said = f"{plural(self.detections, 'detection')} in {' and '.join(parts)}"
        if not self.detections and self.images + self.frames:
            said += (
                f", as no score is above {self.predictor.highest:.2f}: lower --confidence-threshold"
            )
        if self.left_out:
            said += f", {plural(self.left_out, 'input')} left out"
        if self.passed_over:
            said += f", {plural(self.passed_over, 'image')} that demo.py had drawn skipped"
        return said


def enlarge(image: Image.Image, instances: Instances) -> tuple[Image.Image, Instances]:
    """Enlarge a small image, its boxes and masks by an integer, to at most `ENLARGED_SIDE`."""
    factor = max(1, ENLARGED_SIDE // max(image.size))
    width, height = (factor * side for side in image.size)
    larger = Instances((height, width), **instances.get_fields())
    larger.pred_boxes = Boxes(factor * instances.pred_boxes.tensor)
    if instances.has("pred_masks"):
        masks = instances.pred_masks
        larger.remove("pred_masks")
        larger.pred_masks = masks.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return image.resize((width, height)), larger


def warn(sentence: str) -> None:
    tqdm.write(sentence, file=sys.stderr)


def run(
    annotator: Annotator, images: list[Path], ids: list[int], videos: list[Path | Video]
) -> None:
    """Annotate all inputs, until the window or the keyboard stops it."""
    first_frame = len(images) + 1
    more = annotator.run_images(images, ids)
    for source in videos:
        if not more:
            return
        try:
            with source if isinstance(source, Video) else Video(source) as video:
                more = annotator.run_video(video, first_frame + annotator.frames)
        except VideoError as error:
            annotator.leave_out(error)
