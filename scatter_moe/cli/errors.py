"""What the user can mend: printed as one line, exit code 2."""


class UsageError(Exception):
    """A wrong target, or a package that is missing."""
