"""Settings of a model's config for the length of a block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def configured(config: Any, **settings: Any) -> Iterator[None]:
    """The config of a model of any family with other settings, until the end of the block, however it ends.

    Raises:
        ValueError: if the config has no such field, or does not allow its value.
    """
    unknown = [name for name in settings if not hasattr(config, name)]
    if unknown:
        raise ValueError(f"The config has no fields {unknown}; see RecoverySettings.")
    before = {name: getattr(config, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(config, name, value)
        config.validate_recovery()
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
