"""How an error that kept a replica from starting comes back as the error that it was: through text alone.

Ray Serve reports such errors as text, within a traceback, in the status of the deployment.
"""

import json
import re

from surgery import errors

_MARK = "surgery-start-failure "
_LINE = re.compile(rf"{_MARK}(\{{.*\}})\s*$", re.MULTILINE)


class StartFailure(RuntimeError):
    """An error, written in one line that `read` finds again."""

    @classmethod
    def of(cls, error, model):
        """The StartFailure for whatever kept a replica from loading a model."""
        if not isinstance(error, errors.SurgeryError):
            error = errors.SurgeryError(f"{model} cannot be loaded: {type(error).__name__}: {str(error).strip()}")
        return cls(_MARK + json.dumps({"kind": type(error).__name__, "message": str(error)}))


def read(text):
    """The SurgeryError that a text with a StartFailure in it tells of, or None."""
    found = _LINE.search(text)
    if found is None:
        return None
    told = json.loads(found.group(1))
    kind = getattr(errors, told["kind"], errors.SurgeryError)
    kind = errors.InputError if kind is errors.RecipeError else kind  # which is made of problems, not of a text
    return kind(told["message"])
