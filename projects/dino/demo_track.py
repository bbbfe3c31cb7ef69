"""Tracks objects through the frames of a video."""

from types import ModuleType

import numpy as np
import torch
from detectron2.structures import Instances
from torchvision.ops import nms

from dino_d2 import Predictor

# As in ByteTrack's experiments:
LOWEST_SCORE = 0.1  # of detections that may continue a track
SAME = 0.7  # IoU of two detections, from which on they are of one object


def trackers() -> ModuleType:
    """Import trackers; raise an ImportError with a hint if it is not installed."""
    try:
        import trackers
    except ImportError as error:
        raise ImportError("tracks need trackers: pip install trackers") from error
    return trackers


class Tracker:
    """Gives the objects of one video ids, by ByteTrack (2110.06864), whatever their classes are.

    Detections of at least the threshold of their class begin and continue tracks, lower ones only
    continue those without a better match. Of two overlapping ones with different classes, the one
    with the higher score counts. An object gets its id, from 0 on, in the second frame that it is
    found in, and keeps it if it is not found for up to a second.

    Args:
        predictor: has the thresholds
        rate: frames per second

    Raises:
        ImportError: trackers, which has ByteTrack, is not installed
    """

    def __init__(self, predictor: Predictor, rate: float):
        self.least = torch.tensor([predictor.thresholds[x] for x in predictor.classes])
        self.lowest = min(LOWEST_SCORE, *self.least.tolist())  # threshold for what is tracked
        # Thresholds differ by class: scores are told to it as 1 from the threshold on, 0 below.
        self.tracker = trackers().ByteTrackTracker(
            frame_rate=rate, high_conf_det_threshold=0.5, track_activation_threshold=0.5
        )

    def __call__(self, found: Instances) -> Instances:
        """Those of the next frame's detections in a track, or of their class's threshold.

        Returns:
            in descending order of score, with track_ids (n,) of int64, -1 outside of tracks
        """
        from supervision import Detections

        found = found[nms(found.pred_boxes.tensor, found.scores, SAME)]
        high = found.scores >= self.least[found.pred_classes]
        boxes, places = found.pred_boxes.tensor.numpy(), np.arange(len(found))
        given = Detections(boxes, confidence=high.float().numpy(), data={"place": places})
        tracked = self.tracker.update(given)
        found.track_ids = torch.full((len(found),), -1)
        if len(tracked):
            found.track_ids[tracked.data["place"]] = torch.from_numpy(tracked.tracker_id)
        return found[high | (found.track_ids >= 0)]
