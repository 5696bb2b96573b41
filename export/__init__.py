"""What goes out: compiled engines, the repository on the Hub with its card, the server."""
