"""What a cluster's job script asks: whether there is anything to do, and whether to go on after a part of a run."""
