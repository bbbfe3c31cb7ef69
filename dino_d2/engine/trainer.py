"""Detectron2's training loop, with a step made for long runs."""

import logging
import math
import os
import time
from contextlib import nullcontext

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.stream import TrainingStream, seed_for
from ..distributed.sharing import gather, load_optimizer, mean_over_workers, suspend_sync, unwrap
from ..layouts.renaming import CheckpointError
from ..modeling.detector import Detector
from ..structures import send_to_device
from ..weights.files import write

logger = logging.getLogger(__name__)

# After this many bad steps in a row the weights are broken. Larger than the number of halvings of
# 65,536 that a GradScaler may need.
MAX_SKIPPED = 20

Batch = list[dict]


class NonFiniteLoss(FloatingPointError):
    """A loss is NaN or infinite; the message says which, when and for which images."""


class Trainer(SimpleTrainer):
    """Detectron2's loop and hooks, with its own step.

    Random numbers in a step depend only on seed, iteration and worker, and its images on seed and
    iteration. So a checkpoint only needs the iteration, and a resumed run equals an uninterrupted
    one.

    Args:
        model: as of `distribute`; returns a dict of losses
        stream: of batches
        optimizer: updates the weights once per step
        precision: of autocast; float16 includes a GradScaler; None: no autocast
        accumulate: micro-batches per step (gradient accumulation), equal to one large batch, see
            `shares`
        skip_non_finite: skip steps that are not finite, at most `MAX_SKIPPED` in a row, instead of
            ending training
        output_dir: inputs and weights of the first `MAX_SKIPPED` such steps are saved there, in the
            folder `non_finite`
    """

    def __init__(
        self,
        model: nn.Module,
        stream: TrainingStream,
        optimizer: torch.optim.Optimizer,
        *,
        precision: torch.dtype | None = None,
        accumulate: int = 1,
        skip_non_finite: bool = False,
        output_dir: str = "output",
    ):
        super().__init__(model, stream, optimizer)
        self.precision, self.accumulate = precision, accumulate
        self.skip_non_finite, self.output_dir = skip_non_finite, output_dir
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision is torch.float16)
        self.skipped = 0  # steps in a row
        self.saved = 0  # steps that were not finite
        self.last = -1  # iteration of the last completed step
        self.max_iter = 0  # until it is known
        self.planned_end: int | None = None  # of the training that this one resumes
        # Changed by the forward pass, and spoilt if the loss is not finite.
        norms = (x for x in model.modules() if isinstance(x, _BatchNorm))
        self.statistics = [x for norm in norms for x in norm.buffers()]

    def run_step(self) -> None:
        """Run one step; raises NonFiniteLoss on all workers, before weights are updated."""
        start = time.perf_counter()
        batches = [next(self._data_loader_iter) for _ in range(self.accumulate)]
        data_time = time.perf_counter() - start

        seed_all_rng(seed_for(self.data_loader.seed, self.iter, comm.get_rank()))
        self.optimizer.zero_grad()
        kept = [x.clone() for x in self.statistics]
        metrics = self.forward_backward(batches)
        self.after_backward()
        self.scaler.unscale_(self.optimizer)
        metrics["grad_norm"] = grad_norm(self.parameters)
        metrics["data_time"] = torch.full((), data_time, device=self.device)
        values = mean_over_workers(torch.stack(list(metrics.values()))).cpu().tolist()
        # This synchronises with the device once (and a GradScaler once more).
        means = dict(zip(metrics, values, strict=True))
        if not self.update(means):
            for x, before in zip(self.statistics, kept, strict=True):
                x.copy_(before)
            self.handle_non_finite(batches, metrics, means)
        self.storage.put_scalars(**means)
        self.last = self.iter

    def update(self, means: dict[str, float]) -> bool:
        """Update the weights unless the step is not finite; returns whether it did."""
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        self.skipped = self.skipped + 1 if bad else 0
        # Float16 gradients overflow until the GradScaler has found its scale; it skips those steps.
        overflows = self.scaler.is_enabled() and bad == ["grad_norm"]
        if bad and not (overflows and self.skipped <= MAX_SKIPPED):
            return False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return True

    def forward_backward(self, batches: list[Batch]) -> dict[str, Tensor]:
        """The losses of a step and their sum, `total_loss`; accumulates gradients."""
        step: dict[str, Tensor] = {}
        narrow = self.precision is not None
        for number, (batch, share) in enumerate(zip(batches, self.shares(batches), strict=True), 1):
            is_last = number == len(batches)
            with nullcontext() if is_last else suspend_sync(self.model):
                with torch.autocast(self.device.type, self.precision, enabled=narrow):
                    losses = self.model(batch)
                losses["total_loss"] = torch.stack(list(losses.values())).sum()
                self.scaler.scale(share * losses["total_loss"]).backward()
            for name, loss in losses.items():
                step[name] = step.get(name, 0) + share * loss.detach()
        return step

    def shares(self, batches: list[Batch]) -> Tensor:
        """The weight of each micro-batch, so that a step equals one with all images at once.

        A Detector divides losses by a number of boxes, which has to be that of the step. (Denoising
        groups are still made per micro-batch, as they are per worker.) Other models average over
        images.
        """
        model = unwrap(self.model)
        if len(batches) == 1 or not isinstance(model, Detector):
            return torch.full([len(batches)], 1 / len(batches), device=self.device)
        counts = [float(model.loss_divisor(batch)) for batch in batches]
        boxes = mean_over_workers(send_to_device(torch.tensor(counts), like=self.parameters[0]))
        return boxes.clamp(min=1) / boxes.sum().clamp(min=1)

    def handle_non_finite(
        self, batches: list[Batch], own: dict[str, Tensor], means: dict[str, float]
    ) -> None:
        """Log which loss is not finite, save its inputs and, unless to be skipped, raise.

        Saves the images of the workers whose own losses are not finite, if there are any.
        """
        names = [name for name, value in means.items() if not math.isfinite(value)]
        names = [name for name in names if name != "total_loss"] or names
        guilty = any(not own[name].isfinite() for name in names if name != "grad_norm")
        samples = [x for batch in batches for x in batch]
        files = [x.get("file_name", "an image") for x in samples]
        files += [name for x in samples for name in x.get("mixed_with", ())]
        everyone = comm.all_gather((guilty, files))
        some = any(guilty for guilty, _ in everyone)
        images = ", ".join(x for guilty, files in everyone if guilty or not some for x in files)
        skip = self.skip_non_finite and self.skipped <= MAX_SKIPPED
        text = f"iteration {self.iter}: NaN or infinite {', '.join(names)}, with images {images}"
        self.saved += 1
        if not skip or self.saved <= MAX_SKIPPED:
            folder = self.save_non_finite(batches, own, with_weights=not skip)
            text += f"; the inputs are in '{folder}'"
        if not skip:
            raise NonFiniteLoss(
                f"{text}: look at these images and their boxes; if they are right, restart "
                "from an earlier checkpoint with a lower learning rate, or without mixed precision"
            )
        logger.warning(f"{text}; the step is skipped")

    def save_non_finite(
        self, batches: list[Batch], own: dict[str, Tensor], *, with_weights: bool
    ) -> str:
        """Save this worker's inputs and losses, and the main worker's weights; returns where."""
        folder = os.path.join(self.output_dir, "non_finite")
        os.makedirs(folder, exist_ok=True)
        content = {
            "iteration": self.iter,
            "seed": self.data_loader.seed,
            "losses": {name: value.item() for name, value in own.items()},
            "images": [plain_input(x) for batch in batches for x in batch],
        }
        if with_weights:
            weights = gather(unwrap(self.model).state_dict())
            content |= {"model": weights} if comm.is_main_process() else {}
        write(content, os.path.join(folder, f"{self.iter:07d}_worker_{comm.get_rank()}.pth"))
        return folder

    def state_dict(self) -> dict:
        state = super().state_dict()
        return state | {
            "iteration": self.last,
            "optimizer": gather(state["optimizer"]),
            "scaler": self.scaler.state_dict(),
            "seed": self.data_loader.seed,
            "max_iter": self.max_iter,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state; a CheckpointError if its optimizer or parameters differ."""
        super(SimpleTrainer, self).load_state_dict(state)
        try:
            load_optimizer(self.optimizer, state["optimizer"])
        except ValueError as error:
            raise CheckpointError(
                "the checkpoint to resume from has another optimizer or other parameters: keep "
                "these, or start a new run from its weights (MODEL.WEIGHTS, "
                "train.init_checkpoint) without --resume"
            ) from error
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.last, self.planned_end = self.iter, state["max_iter"]
        self.data_loader.seed = state["seed"]
        self.data_loader.start = (self.iter + 1) * self.accumulate


def grad_norm(parameters: list[nn.Parameter]) -> Tensor:
    """The norm of all gradients together, on every worker."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def plain_input(x: dict) -> dict:
    """Convert an input of the model to tensors and numbers, which load without pickled code."""
    kept = {k: x[k] for k in ("file_name", "image_id", "height", "width", "image") if k in x}
    if "instances" in x:
        instances = x["instances"]
        kept |= {"boxes": instances.gt_boxes.tensor, "classes": instances.gt_classes}
    return kept
