"""Tests of slope_dist/watching."""
