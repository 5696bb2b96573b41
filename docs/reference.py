"""The site's reference pages, made from the code: verbs from their parser, recipe keys from the schema, the tables of
operators and guidance, Python from docstrings. mkdocs runs this through its gen-files plugin (mkdocs.yml).
"""

import argparse
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mkdocs_gen_files

import surgery
from surgery.cli.main import VERBS, build_parser
from surgery.guidance.methods import METHODS
from surgery.nn.operators import HYPERPARAMETERS, OPERATIONS
from surgery.recipe.schema import Recipe

HERE = Path(__file__).resolve().parent.parent
PYTHON = {"surgery": surgery.__all__, "surgery.nn": surgery.nn.__all__, "surgery.validate": surgery.validate.__all__}


def write(page: str, text: str) -> None:
    """Add a page to the site."""
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(text)


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"


def table(head: list[str], rows: list[str]) -> str:
    """A Markdown table."""
    return "\n".join([row(*head), "|---" * len(head) + "|", *rows]) + "\n"


def home() -> str:
    """README, its links as they are from docs/."""
    return (HERE / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")


def command_line() -> str:
    """A section for each verb: its usage and its options."""
    [verbs] = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    parts = ["# The command line\n\nEvery verb as its `--help` has it. Exit status 0 is done, 1 failed, 2 bad input.\n"]
    for verb, (_, line) in VERBS.items():
        parser = verbs.choices[verb]
        rows = []
        for action in parser._actions:
            name = ", ".join(action.option_strings) or action.metavar or action.dest
            value = f" {action.metavar or ''}".rstrip() if action.option_strings else ""
            choices = f"one of {', '.join(map(str, action.choices))}; " if action.choices else ""
            said = parser._get_formatter()._expand_help(action) if action.help else ""
            rows.append(row(f"`{name}{value}`", choices + said))
        parts.append(f"## surgery {verb}\n\n{line[0].upper()}{line[1:]}.\n\n" + table(["argument", "what it is"], rows))
    return "\n".join(parts)


def type_of(schema: dict[str, Any]) -> str:
    """A JSON schema's type in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(type_of(one) for one in schema[several] if one.get("type") != "null"))
    if schema.get("type") == "array":
        return f"list of {type_of(schema.get('items', {}))}"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}
    said = [f"{sign} {schema[key]:g}" for key, sign in limits.items() if key in schema and abs(schema[key]) < 1e29]
    return " ".join([schema.get("type", "any"), *said])


def heading_of(name: str) -> str:
    """What the section of an operator or addition is called, as its model in a recipe's schema."""
    return f"{name.capitalize()}{'Addition' if OPERATIONS[name].role else ''}"


def recipe() -> str:
    """A section for each mapping of a recipe: its keys with types and defaults."""
    schema = Recipe.model_json_schema()
    skipped = ("Any", "Recipe")  # what a mapping is held to that names no operator or method
    own = {
        "operators": {heading_of(name) for name in OPERATIONS},
        "guidance": {part.__name__ for part in METHODS.values()},
    }
    parts = ["# A recipe's keys\n\nA recipe is YAML. Unknown keys and loose types are refused.\n"]
    for name, part in [("Recipe", schema), *schema["$defs"].items()]:
        if (name.startswith(skipped) and part is not schema) or any(name in names for names in own.values()):
            continue
        rows = [
            row(
                f"`{key}`",
                type_of(value),
                "required"
                if key in part.get("required", ())
                else ""
                if value.get("default") in (None, {})
                else f"`{value['default']}`",
                value.get("description", ""),
            )
            for key, value in part.get("properties", {}).items()
        ]
        parts.append(f"## {name}\n\n{part.get('description', '')}\n\n" + table(["key", "type", "default", ""], rows))
    text = "\n".join(parts)
    for page, names in own.items():
        for name in names:
            text = text.replace(f"[{name}](#{name.lower()})", f"[{name}]({page}.md#{name.lower()})")
    return re.sub(r"( or )?\[Any\w+\]\(#\w+\)( or )?", "", text)


def operators() -> str:
    """A section for each operator, and the table of hyperparameters."""
    parts = [f"# Operators\n\n{inspect.getdoc(__import__('surgery.nn.operators', fromlist=['x']))}\n"]
    for name, operator in OPERATIONS.items():
        defaults = [f"`{key}` {value:g}" for key, value in operator.defaults.items()]
        parts.append(
            f"## {heading_of(name)}\n\n{operator.title}.\n\n{operator.formula}\n\nSource: {operator.source}. "
            f"Defaults: {', '.join(defaults)}.\n"
        )
    rows = [row(f"`{name}`", one.meaning, one.must) for name, one in HYPERPARAMETERS.items()]
    parts.append("## Hyperparameters\n\n" + table(["name", "what it is", "must"], rows))
    return "\n".join(parts)


def guidance() -> str:
    """A section for each method: its docstring and settings."""
    parts = [
        "# Methods of guidance\n\nEach as a recipe's `guidance: {method: ...}`. C and U are the model's outputs with "
        "and without the prompt, W that of a weakened model, w `guidance_scale`, which is one more than the w of "
        "papers that write C + w (C - U).\n"
    ]
    for name, part in METHODS.items():
        rows = [
            row(f"`{key}`", f"`{field.default}`")
            for key, field in part.model_fields.items()
            if key != "method" and not field.is_required()
        ]
        parts.append(
            f"## {part.__name__}\n\n`{name}`: {inspect.getdoc(part)}\n\n" + table(["setting", "default"], rows)
        )
    return "\n".join(parts)


def python() -> Iterator[str]:
    """mkdocstrings' marks for every public name."""
    yield "# Python\n"
    for module, names in PYTHON.items():
        yield f"\n## {module}\n"
        for name in names:
            value = getattr(__import__(module, fromlist=[name]), name)
            if inspect.isfunction(value) or inspect.isclass(value):
                shipped = not value.__module__.startswith("surgery")  # its class is made from the joined file
                home = f"{module}.{name}" if shipped else f"{value.__module__}.{value.__qualname__}"
                yield f"\n::: {home}\n    options:\n      heading_level: 3\n      heading: {module}.{name}\n"


write("index.md", home())
write("reference/command-line.md", command_line())
write("reference/recipe.md", recipe())
write("reference/operators.md", operators())
write("reference/guidance.md", guidance())
write("reference/python.md", "".join(python()))
