"""A detector as one file: graph.py writes it, runtime.py runs it."""

from ..detectron import INSTALLED
from .differences import compare
from .runtime import About, Exported, ExportedModel, ExportError, fit

if INSTALLED:
    from .graph import Exportable, check, export, save
