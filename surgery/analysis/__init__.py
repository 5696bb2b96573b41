"""What an operator does, beyond scores: attention maps, inversion, and what people see in a blind study."""
