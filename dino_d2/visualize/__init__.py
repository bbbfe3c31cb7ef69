"""Figures of data, detections, errors and the model's intermediate results."""

from .error_plots import draw_error_plots
from .explain import draw_masks, draw_proposals, draw_refinement, surest_queries
from .explain_attention import draw_attention_maps, draw_sampling, draw_self_attention
from .explain_page import explanation_page
from .explain_training import draw_denoising, draw_matching
from .image_errors import LEGEND, draw_image_errors
from .images import draw_curves, draw_instances, draw_segments
from .marks import Mark, class_colour, contact_sheet, draw_marks, resize_long_side
from .page import data_uri, html_figure, html_page
