"""Models that nobody trained: true shapes with made-up weights, and equal models off the grid."""
