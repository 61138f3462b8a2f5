"""The one exception that the command line turns into a paragraph on stderr."""


class UserError(Exception):
    """Something the user gave cannot be used.

    The message is one paragraph: the thing by name, what was expected, what came and what to do. The command line
    prints it without a traceback and exits with status 2; code that uses slicemod as a library may catch it.
    """
