"""Tests of slope_dist.layers."""
