"""Matches regular expressions that come with checkpoints: some take for ever in Python's `re`."""

_SECONDS = 0.01  # of the processor, for one name; those of real checkpoints take microseconds
_LONGEST = 1000  # characters


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches the beginning of a name, as `re.match` does.

    Raises ValueError if it is no regular expression, or takes too long.
    """
    import regex

    if len(pattern) > _LONGEST:
        raise ValueError(f"more than {_LONGEST} characters")
    try:
        return regex.match(pattern, name, timeout=_SECONDS) is not None
    except regex.error as error:
        raise ValueError(str(error)) from error
    except (RecursionError, TimeoutError) as error:
        raise ValueError("it takes too long") from error
