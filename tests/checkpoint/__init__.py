"""Tests of slope_dist/checkpoint."""
