"""A model ready to draw: loaded, drawing, and drawing in workers."""
