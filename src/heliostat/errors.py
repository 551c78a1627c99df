"""The one error that means: the user asked for something we refuse, and here is what would work."""


class Refused(ValueError):
    """A wish that cannot be granted. The message names the offending value, the allowed ones and the way out."""
