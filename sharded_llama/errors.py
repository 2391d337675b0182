"""Exception types that a user's mistake or a broken input raises.

Each message names the thing that is wrong, where it is, and what would be right. Launchers print the
message alone and exit with status 1; any other exception is a bug and keeps its traceback.
"""


class ShardedLlamaError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(ShardedLlamaError, ValueError):
    """A model configuration that is missing, malformed or not supported."""


class MeshError(ShardedLlamaError, ValueError):
    """A mesh that the devices or the model's shapes do not allow."""


class CheckpointError(ShardedLlamaError, ValueError):
    """A checkpoint that is missing, truncated, or does not hold the configured model."""


class TokenizerError(ShardedLlamaError, ValueError):
    """A tokenizer that is missing or unusable."""


class RequestError(ShardedLlamaError, ValueError):
    """A generation request whose prompt or sampling parameters are not acceptable."""


class EngineError(ShardedLlamaError, RuntimeError):
    """An engine that cannot go on: a step failed, or it was shut down."""


class ConstraintError(ShardedLlamaError, RuntimeError):
    """An answer that cannot go on within what its request allows: no token is left, or its grammar hit a limit."""


class TrainingError(ShardedLlamaError, ValueError):
    """Training settings that cannot work."""


class ParityError(ShardedLlamaError, ValueError):
    """A comparison with a reference that cannot be made: a wrong or broken reference, or nothing to compare."""
