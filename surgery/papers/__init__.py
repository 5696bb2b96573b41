"""The papers' tables and figures: one manifest each (recipes/papers/*.yaml), planned, drawn again and set beside them."""
