"""Annotates images and videos and collects the results, for `demo.py`."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import demo_video
import numpy as np
import torch
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
from dino_d2.visualize import draw_instances, draw_segments

# Small images are enlarged to at most this long side in pixels, so that labels do not hide objects.
ENLARGED_SIDE = 640

Result = dict[str, Any]  # as of `Predictor.results`


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
        self.kind, self.found = "detection", 0  # what is drawn, and how many
        self.images = self.frames = self.videos = self.left_out = 0

    def run_images(self, paths: list[Path], ids: list[int]) -> bool:
        """Annotate images, skipping unreadable ones; returns whether to continue."""
        shots = self.detect(self.read(paths, ids))
        for shot, result in progress(shots, "image", total=len(paths)):
            self.images += 1
            save = self.output and self.free_path(shot.names["file_name"], ".png")
            if not self.draw(shot, result, save and partial(save_picture, path=save)):
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
            for shot, result in found:
                self.frames += 1
                if not self.draw(shot, result, writer and writer.write, stay=False):
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
    ) -> Iterator[tuple[Shot, Result]]:
        """Detect in batches, count what is drawn, and keep the detections."""
        while batch := list(islice(shots, self.batch_size)):
            results = self.find([shot.picture for shot in batch], tracker)
            for shot, result in zip(batch, results, strict=True):
                if self.categories:
                    self.results += to_results(
                        shot.names, result["instances"], self.predictor.classes, self.categories
                    )
                if segments := segments_of(result):
                    self.kind = "segment"
                self.found += len(segments[1] if segments else result["instances"])
                yield shot, result

    def find(self, pictures: list[np.ndarray], tracker: Tracker | None) -> Iterable[Result]:
        """Results in whole images; or detections in their tiles, or in tracks."""
        threshold = tracker.lowest if tracker else None
        if self.tiles:
            known = {"size": self.tiles, "batch_size": self.batch_size, "threshold": threshold}
            found = [detect_in_tiles(self.predictor, x, **known) for x in pictures]
        elif tracker:
            found = self.predictor(pictures, threshold)
        else:
            return self.predictor.results(pictures)
        return [{"instances": tracker(x) if tracker else x} for x in found]

    def draw(
        self,
        shot: Shot,
        result: Result,
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
        image, classes = Image.fromarray(shot.picture), self.predictor.classes
        factor = max(1, ENLARGED_SIDE // max(image.size)) if stay else 1
        image = image.resize([factor * side for side in image.size])
        if segments := segments_of(result):
            picture = draw_segments(image, enlarge(segments[0], factor), segments[1], classes)
        else:
            picture = draw_instances(image, enlarge_boxes(result["instances"], factor), classes)
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
        said = f"{plural(self.found, self.kind)} in {' and '.join(parts)}"
        if self.kind == "detection" and not self.found and self.images + self.frames:
            said += (
                f", as no score is above {self.predictor.highest:.2f}: lower --confidence-threshold"
            )
        if self.left_out:
            said += f", {plural(self.left_out, 'input')} left out"
        if self.passed_over:
            said += f", {plural(self.passed_over, 'image')} that demo.py had drawn skipped"
        return said


def segments_of(result: Result) -> tuple[torch.Tensor, list[dict]] | None:
    """What a picture shows as segments, as `draw_segments` takes it: those of a panoptic model, or
    the classes of pixels of one that has nothing else; None: it shows instances."""
    if "panoptic_seg" in result:
        return result["panoptic_seg"]
    if "instances" in result:
        return None
    labels = result["sem_seg"].argmax(0)
    return labels + 1, [{"id": x + 1, "category_id": x} for x in labels.unique().tolist()]


def enlarge(maps: torch.Tensor, factor: int) -> torch.Tensor:
    """Maps (..., height, width) with each pixel repeated in both directions."""
    return maps.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def enlarge_boxes(instances: Instances, factor: int) -> Instances:
    """Detections, with their masks, in an image enlarged by an integer."""
    height, width = instances.image_size
    larger = Instances((factor * height, factor * width), **instances.get_fields())
    larger.pred_boxes = Boxes(factor * instances.pred_boxes.tensor)
    if instances.has("pred_masks"):
        larger.remove("pred_masks")
        larger.pred_masks = enlarge(instances.pred_masks, factor)
    return larger


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
