"""Tests of slope_dist/engine."""
