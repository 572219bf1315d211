"""Errors of the data side that travel from a Ray worker to the person, so each can be pickled and says what to do.

UserError(ValueError)      something a person can mend without reading a traceback; the message says how
  DataError                the data, not the code, needs a change
UnreadableRow(ValueError)  one row could not be read; counted, named and, within `max_bad_rows`, left out
"""


class UserError(ValueError):
    """What was given, what is allowed, what to do. The command line prints the message alone."""


class DataError(UserError):
    """The data cannot be used as it is: what was found, and what to do about it."""


class UnreadableRow(ValueError):
    """One item could not be read. Raise it in a transform of your own to have the item counted as a bad row."""
