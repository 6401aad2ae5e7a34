"""The one exception of this package that a user can mend. `segmentation` has its own: neither imports the other."""


class UserError(ValueError):
    """A mistake that the user can mend. The message is one sentence: what is wrong, in which file, what to do.

    The command prints it without a traceback. Any other exception is a bug, here or in a library, and keeps its own.
    """
