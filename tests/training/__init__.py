"""Tests of slope_dist/training."""
