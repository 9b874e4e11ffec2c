"""How good mball's plans are, and what they take to make."""
