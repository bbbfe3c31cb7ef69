"""Error analysis: `matching` of boxes, `analysis` in numbers; `engine.evaluator` writes files."""
