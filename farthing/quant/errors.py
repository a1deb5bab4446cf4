"""What can be wrong with a model."""


class ModelError(Exception):
    """The model cannot be fetched, loaded or run; the message says why and what to do."""
