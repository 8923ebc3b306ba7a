"""One file a promise. `python -m benchmarks` runs the quick ones, `python -m benchmarks.NAME` one of them."""
