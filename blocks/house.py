"""The names of the four packages, lowest first: each may import those before it, and no other of ours."""

HOUSE = ("blocks", "training", "cluster", "pipelines")
