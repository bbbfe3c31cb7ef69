"""Import paths of earlier versions, for scripts and saved configs that use them."""

import importlib
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "backbone_weights": ("layouts.backbones", "layouts.renaming", "layouts.adapt"),
    "checkpoint": ("layouts.dino", "layouts.renaming", "layouts.adapt", "data.coco_classes"),
    "checkpoint_io": ("weights.files", "weights.download", "atomic"),
    "checkpointer": ("weights.checkpointer", "weights.settings", "weights.fitting"),
    "data.coco_faults": ("data.faults", "data.coco_json", "errors"),
    "evaluation.errors": ("evaluation.analysis",),
    "evaluation.evaluator": ("engine.evaluator",),
    "model_zoo": ("weights.model_zoo",),
    "modeling.inference": ("modeling.fold_norms",),
    "modeling.predecessors": (
        *("modeling.query_selection", "modeling.denoising"),
        *("modeling.positions", "modeling.criterion"),
    ),
    "overrides": ("config.overrides",),
    "releases": ("weights.releases",),
    "visualize.errors": ("visualize.image_errors",),
}
RENAMED = {"coco_classes": "known_classes"}
PACKAGE = __package__


class MovedModules(MetaPathFinder, Loader):
    """Makes a module of an old name from the modules that replaced it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        is_moved = package == PACKAGE and name in MOVED
        return ModuleSpec(fullname, self) if is_moved else None

    def exec_module(self, module: ModuleType) -> None:
        for place in reversed(MOVED[module.__name__.removeprefix(f"{PACKAGE}.")]):
            now = importlib.import_module(f"{PACKAGE}.{place}")
            module.__dict__.update({k: x for k, x in vars(now).items() if not k.startswith("__")})
        for old, new in RENAMED.items():
            if hasattr(module, new):
                setattr(module, old, getattr(module, new))
