"""The error of unusable data."""


class DatasetError(ValueError):
    """A dataset cannot be used; the message says what is wrong, where, and what to do."""

    def __init__(self, message: str):
        # PyTorch re-raises errors of loader workers with the traceback as text: only keep its end.
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].rstrip())
