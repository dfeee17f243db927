"""Tests of slope_dist.planning."""
