"""What an operator does beyond scores: diagnostics, attention maps, inversion, and what people see in blind studies."""
