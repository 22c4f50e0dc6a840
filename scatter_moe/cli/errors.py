"""What the user can mend: printed as one line, exit code 2."""


class UsageError(Exception):
    """A wrong target, or a package that is missing."""


def first_line(error: BaseException) -> str:
    """Of its message, which may be empty."""
    return next(iter(str(error).strip().splitlines()), "")
