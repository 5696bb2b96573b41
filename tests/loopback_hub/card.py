"""The metadata of a model card: the YAML between the first two lines of dashes of README.md."""

import yaml


def front_matter(text):
    """The mapping at the head of a README, {} if it has none; a ValueError says what is wrong with it."""
    lines = text.replace("\r\n", "\n").lstrip("\ufeff").split("\n")
    if not lines or lines[0].rstrip() != "---":
        return {}
    end = next((number for number, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if end is None:
        return {}
    try:
        metadata = yaml.safe_load("\n".join(lines[1:end]))
    except yaml.YAMLError as error:
        raise ValueError(f"Error parsing YAML metadata: {error}") from None
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError("Invalid YAML metadata: it should be a mapping")
    return metadata or {}


def problems(text):
    """The errors that the Hub finds in a README's metadata."""
    try:
        metadata = front_matter(text)
    except ValueError as error:
        return [str(error)]
    license_ = metadata.get("license")
    if license_ is not None and not isinstance(license_, (str, list)):
        return ['"license" must be a string']
    return []


def card_data(server, repository, commit):
    """cardData of a commit: its README's metadata and the card given by the test, which wins until a commit is made."""
    given = server.cards.get(repository.name, repository.card) or {}
    readme = commit.tree.get("README.md")
    written = {}
    if readme is not None and readme.has_bytes:
        try:
            written = front_matter(readme.read().decode("utf-8", "replace"))
        except ValueError:
            written = {}
    return {**given, **written} if repository.committed else {**written, **given}
