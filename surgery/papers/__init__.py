"""The papers' tables and figures: a manifest each (recipes/papers/*.yaml), drawn again and set beside the papers'."""
