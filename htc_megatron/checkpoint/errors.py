"""The errors of this package."""

from htc_megatron.config import ConfigError


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written or must not be read, in a sentence that names the file or tensor."""


class PeerLost(CheckpointError):
    """Another rank ended, or can no longer be reached, while all of them wrote or read a checkpoint."""
