"""One small family of user-facing errors.

Every message has the form ``where: got X; expected Y; try Z``. The command line prints it without a traceback
and exits with the class's ``exit_code``; a library user catches the class, or the built-in it also derives from.
"""

from __future__ import annotations


class SSAError(Exception):
    """Base of every error that a user can act on."""

    exit_code = 2

    def __init__(self, where: str, got: object, expected: object, hint: str | None = None) -> None:
        self.where, self.got, self.expected, self.hint = where, got, expected, hint
        message = f"{where}: got {got}; expected {expected}"
        super().__init__(f"{message}; try {hint}" if hint else message)


class InputError(SSAError, ValueError):
    """A tensor or argument of a public function has the wrong shape, dtype, device or value."""


class ConfigError(SSAError, ValueError):
    """A recipe, configuration or command-line value is wrong."""


class BackendError(SSAError, RuntimeError):
    """An explicitly requested backend cannot serve the call. Only ``auto`` chooses another."""


class MissingDependencyError(SSAError, ImportError):
    """An optional package is not installed."""


class DataError(SSAError, ValueError):
    """Malformed input data. The message names file and line or byte."""


class DataSourceError(SSAError, OSError):
    """A data source failed or changed under a running or resumed job."""

    exit_code = 3


class CheckpointError(SSAError, RuntimeError):
    """A checkpoint is corrupt, incomplete or belongs to something else."""

    exit_code = 4


class NumericError(SSAError, ArithmeticError):
    """Training met non-finite numbers that it may not skip."""

    exit_code = 5


class OutOfMemoryError(SSAError, RuntimeError):
    """The device's memory does not suffice."""

    exit_code = 6


class DistributedError(SSAError, RuntimeError):
    """A rank failed, or ranks disagree."""

    exit_code = 7


class DiskError(SSAError, OSError):
    """The disk is full or not writable."""

    exit_code = 8
