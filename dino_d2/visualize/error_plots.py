"""Plots of an error analysis."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation.analysis import IOU_50, Analysis, BestThreshold, SizeScores
from ..evaluation.costs import COSTS
from ..evaluation.matching import MIN_IOU, NEAR
from ..names import plural
from .style import BLUE, DPI, GREY, ORANGE, PALETTE, SKY, VERMILION, YELLOW, escape_name

LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MAX_BARS, MAX_CLASSES, MAX_CURVES = 40, 25, 6  # that are distinguishable in a picture
EXPLAINED = {
    "correct": f"right class, IoU ≥ {MIN_IOU}",
    "classification": f"wrong class, IoU ≥ {MIN_IOU}",
    "localisation": f"right class, IoU {NEAR} to {MIN_IOU}",
    "both": f"wrong class, IoU {NEAR} to {MIN_IOU}",
    "duplicate": "object already detected with a higher score",
    "background": f"no object, IoU < {NEAR}",
    "missed": "annotated, not detected",
}


def draw_error_plots(analysis: Analysis, folder: str | os.PathLike) -> list[Path]:
    """Write per_class, ap_by_size, precision_recall, confusion_matrix and errors as PNG.

    With many classes, only some are shown, as the title says. Returns the paths.
    """
    figures = {
        "per_class": _per_class(analysis),
        "ap_by_size": _ap_by_size(analysis),
        "precision_recall": _precision_recall(analysis),
        "confusion_matrix": _confusion_matrix(analysis),
        "errors": _errors(analysis),
    }
    paths = [Path(folder, f"{name}.png") for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=DPI)
    return paths


def _axes(width: float, height: float, title: str, **labels: object) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set(**labels)
    axes.set_axisbelow(True)
    return figure, axes


def _per_class(analysis: Analysis) -> Figure:
    scored = [x for x in analysis.classes if x.boxes]
    ranked = sorted(scored, key=lambda x: (x.AP, -x.boxes))
    title = "AP of each class, the best one on top"
    if len(ranked) > MAX_BARS:
        half = MAX_BARS // 2
        title = f"AP of the {half} best and the {half} worst of {len(ranked)} classes with boxes"
        ranked = ranked[:half] + ranked[-half:]
    figure, axes = _axes(9, 1.6 + 0.24 * len(ranked), title, xlabel="AP, %", xlim=(0, 100))
    if len(ranked) < len(scored):
        axes.axhline(half - 0.5, color="black", linestyle="--", lw=1)
    places, values = np.arange(len(ranked)), [x.AP for x in ranked]
    bars = axes.barh(places, values, color=BLUE, label="AP (mean of IoU 0.50 to 0.95)")
    for values, marker, colour, label in (
        ([x.AP50 for x in ranked], "o", ORANGE, "AP50 (IoU 0.50)"),
        ([x.AP75 for x in ranked], "D", "black", "AP75 (IoU 0.75)"),
    ):
        axes.plot(values, places, marker, color=colour, markersize=4, label=label, clip_on=False)
    axes.set_yticks(
        places, [f"{escape_name(x.name)} ({plural(x.boxes, analysis.shape)})" for x in ranked]
    )
    axes.set_ylim(-0.7, len(ranked) - 0.3)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    handles = [bars, *axes.lines[-2:]]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _ap_by_size(analysis: Analysis) -> Figure:
    shape = analysis.shape
    title = f"AP and AR by the size of the annotated {shape}, mean over the classes"
    figure, axes = _axes(8, 4.4, title, ylabel="%", ylim=(0, 105))
    colours = {"AP": BLUE, "AP50": SKY, "AP75": ORANGE, "AR": GREY}
    for shift, (name, colour) in zip((-0.3, -0.1, 0.1, 0.3), colours.items(), strict=True):
        for place, size in enumerate(analysis.sizes):
            value = getattr(size, name)
            label = name if place == 0 else None
            axes.bar(place + shift, np.nan_to_num(value), 0.2, color=colour, label=label)
            text = "–" if np.isnan(value) else f"{value:.1f}"
            axes.text(place + shift, np.nan_to_num(value) + 1, text, ha="center", fontsize=8)
    axes.set_xticks(range(len(analysis.sizes)), [_size_label(x, shape) for x in analysis.sizes])
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _size_label(size: SizeScores, shape: str) -> str:
    low, high = round(size.min_area**0.5), round(size.max_area**0.5)
    area = {"all": "any area", "small": f"up to {high}² px", "large": f"from {low}² px"}
    text = area.get(size.size, f"{low}² to {high}² px")
    return f"{size.size}\n{text}\n{plural(size.boxes, shape)}"


def _precision_recall(analysis: Analysis) -> Figure:
    figure = Figure(figsize=(12, 5.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    recall = np.linspace(0, 1, analysis.precision.shape[1])
    there = [k for k, x in enumerate(analysis.classes) if x.boxes]
    title = "Each class at IoU 0.50"
    named = sorted(there, key=lambda k: -analysis.classes[k].boxes)[:MAX_CURVES]
    if len(there) > MAX_CURVES:
        title = f"{len(there)} classes at IoU 0.50, in colour those with the most boxes"
        left.plot(recall, analysis.precision[IOU_50][:, there], color=GREY, alpha=0.25, lw=0.7)
    named.sort(key=lambda k: -analysis.classes[k].AP50)
    for k, colour, line in zip(named, PALETTE, LINES, strict=False):
        scores = analysis.classes[k]
        best = BestThreshold(*scores[-4:])
        # The name comes last, as Matplotlib hides labels that begin with an underscore.
        label = f"AP50 {scores.AP50:.1f}{_at(best)}: {escape_name(scores.name)}"
        curve = analysis.precision[IOU_50, :, k]
        left.plot(recall, curve, color=colour, linestyle=line, lw=2, label=label)
        _mark(left, best, color=colour)
    if len(there) > 1 and not np.isnan(analysis.overall.F1):
        label = f"all classes together{_at(analysis.overall)}"
        _mark(left, analysis.overall, color="black", label=label)
    ious = range(0, len(analysis.precision), 2) if there else ()
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(ious)))
    for index, colour in zip(ious, colours, strict=True):
        curve = analysis.precision[index][:, there].mean(axis=1)
        label = f"IoU {0.5 + 0.05 * index:.2f}: AP {100 * curve.mean():.1f}"
        right.plot(recall, curve, color=colour, lw=2, label=label)
    for axes, text in ((left, title), (right, "Mean over the classes at several IoUs")):
        axes.set_title(text, loc="left", fontsize=11)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        if axes.lines:
            columns = 1 if axes is left else 3
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=columns)
    return figure


def _at(best: BestThreshold) -> str:
    return "" if np.isnan(best.F1) else f", best F1 {best.F1:.1f} at score {best.threshold:.2f}"


def _mark(axes: Axes, best: BestThreshold, **style: Any) -> None:
    """A dot where the best threshold is among precisions and recalls."""
    place = best.recall / 100, best.precision / 100
    axes.scatter(*place, s=45, ec="black", clip_on=False, zorder=3, **style)


def _confusion_matrix(analysis: Analysis) -> Figure:
    names, counts, title = _confused(analysis)
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    side = 3.2 + 0.36 * len(names)
    figure, axes = _axes(
        *(side + 1.2, side),
        f"{title}: counts, colours by row\nat {analysis.limit}, IoU ≥ {MIN_IOU}",
        xlabel="detected as",
        ylabel="annotated as",
    )
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts):
        ink = "white" if shares[row, column] > 0.6 else "black"
        text = f"{counts[row, column]:,}"
        axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=7)
    columns, rows = [*names, "(missed)"], [*names, "(nothing)"]
    axes.set_xticks(range(len(columns)), columns, rotation=90 if len(names) > 6 else 0, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    figure.colorbar(picture, label="share of the row", shrink=0.7)
    return figure


def _confused(analysis: Analysis) -> tuple[list[str], np.ndarray, str]:
    """Names, counts and title of all classes, or of those most often confused."""
    counts, total = analysis.confusion, len(analysis.classes)
    names = [escape_name(x.name) for x in analysis.classes]
    if total <= MAX_CLASSES:
        return names, counts, "Confusion matrix"
    between = counts[:-1, :-1] * ~np.eye(total, dtype=bool)
    weight = between.sum(axis=0) + between.sum(axis=1)
    shown = np.sort(np.argsort(-weight, kind="stable")[:MAX_CLASSES])
    # One row and one column for all other classes, so that sums are preserved.
    groups = np.zeros((MAX_CLASSES + 2, total + 1), dtype=int)
    groups[MAX_CLASSES, :total] = 1
    groups[MAX_CLASSES, shown] = 0
    groups[np.arange(MAX_CLASSES), shown] = 1
    groups[-1, -1] = 1
    title = f"Confusion matrix, the {MAX_CLASSES} of {total} classes most often confused"
    names = [*(names[k] for k in shown), "(other classes)"]
    return names, groups @ counts @ groups.T, title


def _errors(analysis: Analysis) -> Figure:
    totals = {kind: sum(getattr(x, kind) for x in analysis.errors) for kind in EXPLAINED}
    boxes = sum(x.boxes for x in analysis.classes)
    annotated = plural(boxes, f"annotated {analysis.shape}")
    found = sum(number for kind, number in totals.items() if kind != "missed")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    colours = [SKY, *(len(totals) - 2) * [VERMILION], YELLOW]
    bars = left.barh(range(len(totals)), list(totals.values()), color=colours, ec="black", lw=0.5)
    left.bar_label(bars, [f"{x:,}" for x in totals.values()], padding=3, fontsize=9)
    left.set_title(
        f"{plural(found, 'detection')} of {analysis.limit}, {annotated}",
        loc="left",
        fontsize=11,
    )
    left.set_yticks(range(len(totals)), [f"{kind}\n{text}" for kind, text in EXPLAINED.items()])
    left.tick_params(axis="y", labelsize=8)
    left.invert_yaxis()
    costs = [analysis.costs.mean[kind] for kind in COSTS]
    places = [list(totals).index(kind) for kind in COSTS]
    bars = right.barh(places, np.nan_to_num(costs), color=GREY, ec="black", lw=0.5)
    texts = ["–" if np.isnan(x) else f"{x:.1f}" for x in costs]
    right.bar_label(bars, texts, padding=3, fontsize=9)
    right.set_title("their cost in AP: all scores, IoU 0.5 to 0.95", loc="left", fontsize=11)
    right.set_xlim(0, max(1, 1.15 * np.nan_to_num(costs).max()))
    for axes, text in ((left, "number"), (right, "AP")):
        axes.set(xlabel=text)
        axes.set_axisbelow(True)
        axes.grid(axis="x", alpha=0.3)
    left.margins(x=0.1)
    return figure
