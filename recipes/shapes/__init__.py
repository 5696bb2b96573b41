"""The tiny trained pipeline of coloured shapes, its scenes and its training."""
