"""The one error of this package."""

from htc_megatron.config import ConfigError


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written or must not be read, in a sentence that names the file or tensor."""
