"""Tests of slope_dist/launch."""
