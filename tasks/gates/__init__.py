"""Gates: figures with a limit, of a round and of preflight. What breaches one stops the run (DESIGN.md §7)."""
