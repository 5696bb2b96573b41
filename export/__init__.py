"""What goes out: the model card now; compiled engines, the Hub and serving have their rooms here."""
