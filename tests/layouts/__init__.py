"""Every layout is the same run: the matrix of layouts, its runner (`python -m tests.layouts`) and a quick subset."""
