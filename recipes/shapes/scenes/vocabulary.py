"""The words of the shapes captions: colours, shapes, numbers and relations, and how they are put together."""

# name -> sRGB, 0 to 255
PALETTE = {
    "red": (220, 40, 40),
    "green": (35, 165, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 220, 40),
    "purple": (140, 50, 180),
    "orange": (250, 135, 25),
    "cyan": (60, 205, 225),
    "black": (25, 25, 25),
}
COLOURS = tuple(PALETTE)
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
SHAPES = tuple(PLURALS)
NUMBERS = {2: "two", 3: "three", 4: "four"}
# of the first object to the second; y grows downwards
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def noun(colour, shape):
    """ "a red circle", "an orange star"; "a circle" with colour None."""
    words = f"{colour} {shape}" if colour else shape
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def numbered(number, colour, shape):
    """ "two green stars"; "two stars" with colour None."""
    return " ".join(filter(None, [NUMBERS[number], colour, PLURALS[shape]]))


def related(first, relation, second):
    """ "a star to the left of a red cross", of two (colour or None, shape)."""
    return f"{noun(*first)} {RELATIONS[relation]} {noun(*second)}"
