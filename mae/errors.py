"""Exceptions whose message is for the user, and the end of a run before its last step. `data` has its own."""

from pydantic import ValidationError


class ConfigError(Exception):
    """A setting that cannot work; the message names it, its value, the reason and the way out."""


class CheckpointError(Exception):
    """A checkpoint that cannot be read, is damaged, or belongs to something else."""


class RunEnded(Exception):
    """Ends the run before its last step. Raised on all ranks, after the same step."""

    exit_code = 2  # never 0 while work remains


def first_sentence(error: ValidationError) -> str:
    """Returns the first complaint of a pydantic validation as one sentence: setting, value, reason."""
    details = error.errors(include_url=False)
    if absent := [".".join(map(str, detail["loc"])) for detail in details if detail["type"] == "missing"]:
        return f"not set: {', '.join(absent)}"
    detail = details[0]
    setting = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown setting {setting}={detail['input']!r}"
    reason = detail["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    if not setting or detail["type"] == "value_error":
        return f"{setting}: {reason}" if setting else reason
    return f"{setting}={detail['input']!r}: {reason}"
