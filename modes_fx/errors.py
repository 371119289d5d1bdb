"""The errors that modes_fx raises on purpose. Each message says what was needed, what was got, what to do."""


class ModesError(Exception):
    """Base of every error that modes_fx raises on purpose; its text is one sentence for the user."""


class ProfileError(ModesError, ValueError):
    """A profile that cannot be used: unreadable, invalid, or made for another model."""


class RewriteError(ModesError, RuntimeError):
    """A block of the model could not be rewritten, or was, and did not run."""


class SearchError(ModesError, ValueError):
    """No thresholds reach what was asked for; the message names the nearest that do."""


class ExportError(ModesError, RuntimeError):
    """A model that cannot be exported, or a folder of an export that cannot be used."""
