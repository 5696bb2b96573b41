"""The parts of train.py: what the shapes pipeline is made of, what it is shown, and how it is trained."""
