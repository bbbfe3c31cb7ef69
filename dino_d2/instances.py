"""Stand-ins for Detectron2's structures of detections, for where it is not installed.

They have what results are read and filtered with, under Detectron2's names.
"""

from typing import Any

import torch
from torch import Tensor


class Boxes:
    """Boxes as corners.

    Args:
        tensor: (n, 4), x0, y0, x1, y1 in pixels
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.to(torch.float32).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, item: Any) -> "Boxes":
        """Those that an index, a slice or a mask selects."""
        return Boxes(self.tensor[item])

    def __repr__(self) -> str:
        return f"Boxes({self.tensor})"

    def to(self, device: str | torch.device) -> "Boxes":
        return Boxes(self.tensor.to(device))

    def clip(self, box_size: tuple[int, int]) -> None:
        """Clip to an image of (height, width), in place."""
        height, width = box_size
        self.tensor = self.tensor.clamp(min=0).minimum(self.tensor.new_tensor([width, height] * 2))

    def nonempty(self, threshold: float = 0.0) -> Tensor:
        """(n,) bool: whose sides are both longer than `threshold`."""
        return (self.tensor[:, 2:] - self.tensor[:, :2] > threshold).all(1)

    def area(self) -> Tensor:
        """(n,), in square pixels."""
        return (self.tensor[:, 2:] - self.tensor[:, :2]).prod(1)


class Instances:
    """The detections of an image; its fields, of n entries each, are attributes.

    Args:
        image_size: height and width
        fields: by name
    """

    def __init__(self, image_size: tuple[int, int], **fields: Any):
        self.__dict__.update(image_size=image_size, _fields={})
        for name, value in fields.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._fields and len(value) != len(self):
            raise ValueError(f"{name} has {len(value)} entries, the others have {len(self)}")
        self._fields[name] = value

    def __getattr__(self, name: str) -> Any:
        if name == "_fields" or name not in self._fields:
            raise AttributeError(f"these instances have no {name!r}")
        return self._fields[name]

    def __len__(self) -> int:
        return len(next(iter(self._fields.values()), ()))

    def __getitem__(self, item: Any) -> "Instances":
        """Those that an index, a slice or a mask selects."""
        if isinstance(item, int):
            item = [range(len(self))[item]]  # an IndexError beyond the last
        return Instances(self.image_size, **{k: x[item] for k, x in self._fields.items()})

    def __repr__(self) -> str:
        fields = ", ".join(f"{k}={x}" for k, x in self._fields.items())
        return f"Instances({len(self)} in {self.image_size}: {fields})"

    def has(self, name: str) -> bool:
        return name in self._fields

    def get(self, name: str) -> Any:
        return self._fields[name]

    def get_fields(self) -> dict[str, Any]:
        return self._fields

    def to(self, device: str | torch.device) -> "Instances":
        return Instances(self.image_size, **{k: x.to(device) for k, x in self._fields.items()})
