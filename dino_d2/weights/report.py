"""Messages about loaded weights."""

import logging
from collections.abc import Sequence
from typing import Any

from ..layouts.adapt import TRAINING_ONLY
from ..layouts.renaming import CheckpointError
from .fitting import OpenedWeights

logger = logging.getLogger(__name__)


def report_loaded(
    opened: OpenedWeights, incompatible: Any, missing: Sequence[str], total: int, *, fits: bool
) -> None:
    """Log how many tensors were loaded, as a warning if the config may not be that of the weights.

    Args:
        incompatible: Detectron2's result on names and shapes
        missing: names of those of the `total` tensors of the model that keep their initial values
        fits: whether the weights are of this model at all
    """
    _, unexpected, other_shape = incompatible
    message = (
        f"{total - len(missing)} of {total} tensors are from '{opened.file}' "
        f"({opened.form or 'a backbone'}), {len(missing)} keep their initial values, "
        f"{len(unexpected)} were not expected, {len(other_shape)} have another shape"
    )
    if other_shape:
        key, given, wanted = other_shape[0]
        message += f", such as {key}: {given} in the file, {wanted} in the model"
    if not fits:
        message += (
            "; the weights are for another model than the config: use the config that they were "
            "trained with or, to train this one, weights of its backbone"
        )
    logger.log(logging.INFO if fits and not other_shape else logging.WARNING, message)


def report_new_classes(opened: OpenedWeights, new: Sequence[str], total: int) -> None:
    """Log which of the `total` classes of the model have no weights."""
    logger.warning(
        f"{len(new)} of {total} classes are new to '{opened.file}' and initialised in the class "
        f"heads and the label embedding: {', '.join(new)}"
    )


def require_loaded(
    opened: OpenedWeights,
    missing: Sequence[str],
    new_classes: Sequence[str],
    total: int,
    *,
    complete: bool,
) -> None:
    """Raise a CheckpointError if nothing was loaded or, if required, not everything."""
    if len(missing) == total:
        raise CheckpointError(
            f"no tensor of '{opened.file}' fits: weights and config are of different models"
        )
    left = [
        key
        for key in missing
        if not key.startswith(("denoising.", *TRAINING_ONLY))
        and not key.endswith(".num_batches_tracked")
    ]
    if complete and (new_classes or left):
        what = f"the class {new_classes[0]}" if new_classes else f"tensors such as {left[0]}"
        raise CheckpointError(
            f"'{opened.file}' does not fill the model: {what} would be random; use the config "
            "of the weights, and only classes that they have"
        )
