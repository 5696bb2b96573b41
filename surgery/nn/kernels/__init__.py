"""The arithmetic of attention: the reference and the faster forms that are held against it."""
