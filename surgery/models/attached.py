"""Which engine runs a model; torch-free, for those who only want it gone."""

ATTRIBUTE = "pladis_engine"


def attachment(model):
    """The `running.Attachment` of a model, or None."""
    return model.__dict__.get(ATTRIBUTE)


def detach(model):
    """Take a model's engine away, if it has one: it is eager again."""
    if made := attachment(model):
        made.undo()
        delattr(model, ATTRIBUTE)
