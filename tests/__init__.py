"""The tests, in the same rooms as slope_dist."""
