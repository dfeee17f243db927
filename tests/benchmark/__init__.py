"""Tests of slope_dist.benchmark."""
