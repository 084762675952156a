"""Models that nobody trained: true shapes with made-up weights."""
