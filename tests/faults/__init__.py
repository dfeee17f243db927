"""Trials of faults: what is damaged, hostile or absurd is refused by name, some thousand times over."""
