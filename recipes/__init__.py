"""The recipes that ship, as package data: *.yaml, and the tiny trained pipeline under shapes/."""
