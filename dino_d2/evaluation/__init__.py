"""Where a detector goes wrong: matching.py has what belongs together, errors.py the numbers,
evaluator.py the files that they become."""
