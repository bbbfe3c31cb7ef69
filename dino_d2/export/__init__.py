"""A detector as one file: graph.py writes it, runtime.py runs it."""

from .graph import Exportable, check, export, save
from .runtime import About, Exported, ExportedModel, ExportError, compare, fit
