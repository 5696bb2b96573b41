"""The libraries' own notices and loading bars, switched off where the verbs have theirs."""


def quiet_notices():
    """Silence what the libraries tell at import of optional parts that are not used here; imports nothing."""
    import logging
    import os

    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree", "torch.onnx._internal.exporter._registration"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_bars():
    """Switch off the libraries' own loading bars: the verbs have their own."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
