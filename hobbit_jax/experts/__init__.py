"""Every expert's bytes at each precision, and who gets which."""
