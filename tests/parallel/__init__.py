"""Tests of slope_dist/parallel."""
