"""The exceptions that the command line turns into a paragraph on stderr."""

from __future__ import annotations

from collections.abc import Mapping


class UserError(Exception):
    """Something the user gave cannot be used.

    The message is one paragraph: the thing by name, what was expected, what came and what to do. The command line
    prints it without a traceback and exits with status 2; code that uses slicemod as a library may catch it.
    """


class FieldError(UserError):
    """A field has a value that cannot be used. The message begins with the name of the field and a colon."""

    def of_option(self, options: Mapping[str, str]) -> UserError:
        """The same error for a command, whose option gave the value.

        Args:
            options: the option of a field, where it is not the field's name after two dashes.

        >>> str(FieldError("feed_forward: expected none; got one.").of_option({}))
        '--feed-forward: expected none; got one.'
        """
        field, colon, problem = str(self).partition(":")
        option = options.get(field, f"--{field.replace('_', '-')}")
        return UserError(f"{option}{colon}{problem}")
