"""Live models: what attention they have, which of it is meant, patched, inspected."""
