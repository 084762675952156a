"""One trial of a sweep: what it asks, what trials share, and the record that it leaves."""
