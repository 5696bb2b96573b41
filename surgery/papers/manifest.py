"""What a manifest says: one table or figure of a paper, its rows, and the figures that the paper reports for them.

The manifests ship as recipes/papers/*.yaml. models.yaml there names the models that they share, rates.yaml what a step
was measured to take.
"""

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, ValidationError, field_validator, model_validator

from surgery.errors import InputError, nearest
from surgery.hub.bounded import parse_yaml, read_text
from surgery.models.parts import Name, Part, Text
from surgery.recipe.metric_names import MetricName

KINDS = (
    "scores",  # rows by metrics
    "images",  # rows of images alone
    "time",  # seconds an image and peak memory
    "study",  # a blind study's page
    "inversion",  # images to noise and back
    "diagnostics",  # |r| over the steps
    "attention-maps",  # a word's map by each side
    "video",  # videos, and the folders that VBench and FVD read
)
PAPERS = {
    "pladis": "PLADIS, arXiv 2503.07677",
    "gag": "GAG, arXiv 2603.02531",
    "oseg": "slides on SEG and OSEG, Nazmus Saqib",
}
_MODELS, _RATES = "models", "rates"  # the files of the folder that are no manifests
Setting = Annotated[float, Field(allow_inf_nan=True)] | int | str  # eta and blur may be infinite
_LARGEST = 1 << 17  # bytes of a file


class Model(Part):
    """A shipped recipe, and the keys of it that are set otherwise. recipe: None for a model that cannot be drawn."""

    recipe: Name | None = None
    set: dict[str, JsonValue] = {}


class PromptsOf(Part):
    """How much of a prompt set is drawn, and what is measured on it.

    prompts: so many of the set, all unless named. images_per_prompt: drawn of each.
    """

    prompts: Annotated[int, Field(ge=1)] | None = None
    images_per_prompt: Annotated[int, Field(ge=1)] = 1
    metrics: list[MetricName] = []


class TableRow(Part):
    """One row. operator, replace, layers: as a recipe's first operation has them; no operator is the untouched model.

    over: {key: values}: a row for each value of an operator's hyperparameter (operator.scale) or of another key of the
    recipe (guidance.blur). reported: {prompt set: {column: the paper's figure}}.
    """

    name: Text
    model: Name
    operator: dict[str, Setting] | None = None
    replace: Literal["self-attention"] | None = None
    layers: list[Text] | None = None
    over: dict[str, Annotated[list[Setting], Field(min_length=1)]] = {}
    reported: dict[str, dict[str, float]] = {}

    @field_validator("over")
    @classmethod
    def _is_one_key(cls, over: dict[str, Any]) -> dict[str, Any]:
        if len(over) > 1:
            raise ValueError("names more than one key; write a row for each")
        return over


class Manifest(Part):
    """One table or figure. against: the row that the others are compared with; each row's own base unless named.

    sets: {prompt set: PromptsOf}. notes: what the paper leaves open, and what is done here. columns: what the paper
    calls a column, where it is no metric of this package.
    """

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    paper: Literal["pladis", "gag", "oseg"]
    place: Text
    title: Text
    kind: Literal[KINDS]  # pyright: ignore[reportInvalidTypeForm]  of a tuple
    sets: dict[str, PromptsOf] = {}
    seed: int = 0
    against: Text | None = None
    cannot: Text | None = None
    columns: dict[str, Text] = {}
    notes: list[Text] = []
    rows: Annotated[list[TableRow], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_hold(self) -> "Manifest":
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError("two rows have one name")
        if self.against is not None and self.against not in names:
            raise ValueError(f"against names {self.against}, which is no row")
        for row in self.rows:
            for name, figures in row.reported.items():
                known = self.sets[name].metrics if name in self.sets else ()
                if unknown := sorted(figures.keys() - set(known) - self.columns.keys()):
                    raise ValueError(f"{row.name} reports {', '.join(unknown)}, which {name} does not measure")
        return self


def table_names() -> list[str]:
    """The names of all tables and figures, by paper and number."""
    return sorted(_paths().keys() - {_MODELS, _RATES}, key=_order)


def read_table(name: str) -> Manifest:
    """The Manifest of a table's name; InputError with the nearest names for one that does not exist."""
    if name not in table_names():
        near = nearest(name, table_names())
        hint = f'did you mean "{near}"?' if near else "`surgery reproduce` lists them"
        raise InputError(f"no table or figure {str(name)[:100]!r}; {hint}")
    return _read(name, Manifest)


def models() -> dict[str, Model]:
    """{name: Model} of models.yaml."""
    return {name: _checked(_MODELS, Model, values) for name, values in _data(_MODELS).items()}


def rates() -> dict[str, Any]:
    """What rates.yaml says: the machine, the source, and `steps`, each what a call of a model took."""
    return _data(_RATES)


@cache
def _paths() -> dict[str, Path]:
    folder = resources.files("surgery.recipes") / "papers"
    return {Path(str(entry)).stem: Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".yaml")}


@cache
def _data(name: str) -> dict[str, Any]:
    data = parse_yaml(read_text(_paths()[name], _LARGEST))
    assert isinstance(data, dict), f"{name}.yaml holds no mapping"
    return data


@cache
def _read(name: str, part: type[Manifest]) -> Manifest:
    return _checked(name, part, _data(name))


def _checked(name: str, part: type[Any], values: object) -> Any:
    try:
        return part.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{_paths()[name]}: {error}") from error


def _order(name: str) -> list[int | str]:
    """Sorts pladis-figure-9 before pladis-figure-10, with every part at the place of one of its kind."""
    paper, kind, number, *rest = [*name.split("-"), ""][:5]
    digits = "".join(character for character in number if character.isdigit())
    return [list(PAPERS).index(paper) if paper in PAPERS else len(PAPERS), kind, int(digits or 0), number, *rest]
