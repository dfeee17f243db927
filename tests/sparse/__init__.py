"""Tests of slope_dist.sparse."""
