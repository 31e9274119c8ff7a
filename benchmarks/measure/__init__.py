"""Timers, memory, errors, the loop over runs, and the rows that it makes."""
