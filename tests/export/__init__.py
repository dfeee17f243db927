"""Tests of slope_dist.export."""
