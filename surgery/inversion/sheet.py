"""The images, their way through the autoencoder alone, and each side's reconstructions, as one picture."""

from surgery.generating import fitted

ROUND_TRIP = "VAE round trip"


def sheet(inversion, smallest=160):
    """One PIL image: a row for each image that the Inversion kept, under its caption, and a column for each side.

    Beneath a column's name stands its first metric to the image. Images under `smallest` pixels are enlarged without
    smoothing.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = {"image": (inversion.images, None)}
    columns |= {name: (side.images, side.values["image"]) for name, side in inversion.rows.items()}
    metric, info = next(iter(inversion.metrics.items()))
    width, height = inversion.images[0].size
    zoom = max(1, -(-smallest // min(width, height)))
    width, height = width * zoom, height * zoom
    text, gap, margin = max(14, width // 14), 4, 20
    font = ImageFont.load_default(text)
    row = 3 * text + height + margin + 14
    made = Image.new("RGB", (2 * margin + len(columns) * (width + gap), margin + len(inversion.images) * row), "white")
    draw = ImageDraw.Draw(made)
    for line in range(len(inversion.images)):
        top = margin + line * row
        caption = fitted(draw, inversion.prompts[line], font, made.width - 2 * margin)
        draw.text((margin, top), caption, "black", font)
        for column, (name, (images, values)) in enumerate(columns.items()):
            left = margin + column * (width + gap)
            draw.text((left, top + text + 3), fitted(draw, name, font, width), "dimgray", font)
            if values is not None:
                figure = f"{info.title} {values[metric][line]:.4g}"
                draw.text((left, top + 2 * text + 6), fitted(draw, figure, font, width), "dimgray", font)
            image = images[line].resize((width, height), Image.Resampling.NEAREST)
            made.paste(image, (left, top + 3 * text + 12))
    return made
