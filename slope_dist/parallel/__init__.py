"""Where a process stands among the others, what it says to them, and which part of the state is its own."""
