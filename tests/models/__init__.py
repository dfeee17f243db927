"""Tests of slope_dist.models."""
