"""The loop and what it asks: phases, schedules, guards, metrics, evaluation. The one room that sees all the others."""
