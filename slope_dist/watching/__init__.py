"""Watching a run from inside: slow ranks, copies that drift apart."""
