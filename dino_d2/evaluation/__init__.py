"""Error analysis: `matching` of boxes, their `costs`, `analysis`; `engine.evaluator` writes it."""
