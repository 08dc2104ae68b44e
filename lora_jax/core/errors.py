"""Bad input as classes of its own: whatever else is raised is a bug, and keeps its traceback."""


class InputError(ValueError):
    """What was asked for can't be done: one sentence for the user, that names what is wrong and what to do."""


class FileError(InputError, OSError):
    """The system can't read or write a file or directory that was named."""


class MissingError(InputError, FileNotFoundError):
    """A file or directory that was named is not there."""


class OccupiedError(InputError, FileExistsError):
    """What was to be written would replace something."""


class NotLowRankError(InputError):
    """A function uses an adapted parameter in a way that needs `W + AB` as one array."""
