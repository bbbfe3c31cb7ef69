"""Pictures of what the model does."""

from .images import draw_curves, draw_detections, draw_instances

__all__ = ["draw_curves", "draw_detections", "draw_instances"]
