"""One cell of a sweep: what it asks, what cells share, and the row that it leaves."""
