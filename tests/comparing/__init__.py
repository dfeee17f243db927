"""Tests of slope_dist/comparing."""
