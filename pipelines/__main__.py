"""`python -m pipelines` is `fastray`, for where the console command is not on the path: in a submitted job."""

from pipelines.cli import main

main()
