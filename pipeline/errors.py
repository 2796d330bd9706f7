"""The two ways in which a run ends badly, and a help for messages. All else that is raised is a defect of ours."""


class InputError(Exception):
    """The input is wrong: configuration, data, network, or the place to write to. Exit status 2, nothing is written.

    The message is for a person: it names the setting, its value, the limit, and the way out.
    """


class RunError(Exception):
    """The run failed on the way. Exit status 1; what is committed stays, and the message says how to go on."""


class DamagedBlock(RunError):
    """A stored block is not what was written: whoever reads it again meets the same."""


def few(names: list[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are, for a message; empty for none."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
