"""Tests of slope_dist.inference."""
