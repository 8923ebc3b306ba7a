"""Programs that show where a step's time goes under lit_fast and in eager PyTorch: `python -m profiling`."""
