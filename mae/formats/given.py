"""Settings that a file of weights cannot say, as words of a command line: model.num_heads=4 model.norm_pix=false."""

import json
from collections.abc import Sequence
from typing import Any

from mae.errors import ConfigError


def model_settings(words: Sequence[str]) -> dict[str, Any]:
    """Returns fields of MAEConfig or SamConfig by name. Raises ConfigError for words of another form."""
    given: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (name.startswith("model.") and equals):
            raise ConfigError(f"{word}: settings of the model that a file cannot say are written as model.num_heads=4")
        try:
            given[name.removeprefix("model.")] = json.loads(text)
        except ValueError:
            given[name.removeprefix("model.")] = text
    return given
