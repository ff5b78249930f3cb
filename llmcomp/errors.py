"""The one family of errors that llmcomp raises for a user's mistake or a broken file; nothing else lives here."""


class Error(ValueError):
    """What was asked for cannot be done; the message names the thing, what was found and what was expected."""


class CorruptArchive(Error):
    """An archive is damaged, cut short or not an archive at all; no byte of it was passed on."""


class ModelMismatch(Error):
    """The model at hand is not the one that the data were coded with."""


class DatasetError(Error):
    """A data set is missing, incomplete, has a wrong checksum or is too short."""
