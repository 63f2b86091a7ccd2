"""Evaluation: benchmarks, their scores, and what the voco token looks at."""
