"""Read by every Python of a rehearsal before anything else: torch's operators for CUDA are those of the CPU."""

import operators

operators.install()
