"""Detects with an ONNX file of export.py: copy this file where there is no Detectron2."""

import json

import numpy as np
from PIL import Image

NOTES = ("classes", "size", "image_format", "batch_size")


class OnnxDetector:
    """Runs an ONNX file on the CPU.

    Args:
        path: of the file

    Raises:
        ImportError: onnxruntime is not installed
        ValueError: the file is missing, damaged, or not written by export.py
    """

    def __init__(self, path: str):
        try:
            from onnxruntime import InferenceSession
        except ImportError as error:
            raise ImportError("onnxruntime is missing: pip install onnxruntime") from error
        try:
            self.session = InferenceSession(path, providers=["CPUExecutionProvider"])
            notes = self.session.get_modelmeta().custom_metadata_map
            self.about = {key: json.loads(notes[key]) for key in NOTES}
            self.thresholds = json.loads(notes.get("thresholds", "{}"))
        except Exception as error:  # onnxruntime's exceptions have no common base class
            reason = "its notes are missing" if isinstance(error, KeyError) else error
            raise ValueError(f"'{path}' was not written by export.py: {reason}") from error

    def __call__(self, image: Image.Image, threshold: float | None = None) -> list[dict]:
        """Detections: class, score, box (x0, y0, x1, y1 in pixels).

        Of Mask DINO also mask, in COCO's uncompressed RLE.

        Args:
            image: of any size
            threshold: score threshold; default: that of the class in the file, otherwise 0.5
        """
        (height, width), count = self.about["size"], self.about["batch_size"] or 1
        scale = min(height / image.height, width / image.width)
        h, w = max(1, round(image.height * scale)), max(1, round(image.width * scale))
        order, names = self.about["image_format"], self.about["classes"]
        picture = image.convert("RGB" if order == "BGR" else order)
        padded = picture.resize((w, h), Image.Resampling.BILINEAR).crop((0, 0, width, height))
        pixels = np.array([[padded.getchannel(x) for x in order]] * count)
        inputs = {"images": pixels, "image_sizes": np.array([[h, w]] * count, np.int64)}
        boxes, scores, labels, *masks = (x[0] for x in self.session.run(None, inputs))
        boxes = boxes * np.float32([image.width / w, image.height / h] * 2)
        rows = zip(boxes.tolist(), scores.tolist(), labels, *masks, strict=True)
        found = []
        for box, score, label, *logits in rows:
            name = names[label]
            least = self.thresholds.get(name, 0.5) if threshold is None else threshold
            if score >= least:
                found.append({"class": name, "score": score, "box": box})
                for maps in logits:
                    whole = Image.fromarray(maps).resize((width, height), Image.Resampling.BILINEAR)
                    own = whole.crop((0, 0, w, h)).resize(image.size, Image.Resampling.BILINEAR)
                    found[-1]["mask"] = run_lengths(np.asarray(own) > 0)
        return found


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed RLE of a mask (H, W) of bool: column by column, beginning with 0s."""
    pixels = mask.T.ravel()
    ends = np.flatnonzero(
        np.concatenate([[False], pixels]) != np.concatenate([pixels, [not pixels[-1]]])
    )
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}
