"""The one exception for mistakes that a user can mend."""


class InputError(Exception):
    """Something in the user's files, flags or machine does not fit.

    The message is one line: what is wrong, where (file, row, column or flag) and what to do.
    Command lines print it as `error: …` and exit with code 2; libraries may catch it.
    """
