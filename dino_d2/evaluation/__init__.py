"""Where a detector goes wrong: matching.py has what belongs together, analysis.py the
numbers; engine/evaluator.py makes files of them."""
