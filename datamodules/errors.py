"""The exception for a mistake that the user can mend.

`segmentation` has the same class in a file like this one, because neither package imports the other.
"""


class UserError(ValueError):
    """A mistake that the user can mend; the message says in one sentence what is wrong, in which file, and what to do.

    The command prints the message without a traceback. Any other exception is a bug and keeps its traceback.
    """
