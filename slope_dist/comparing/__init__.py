"""Ranks compared with each other: their own speed, and the copies that they hold of the same thing."""
