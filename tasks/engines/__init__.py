"""Generate completions and score sequences, behind one small protocol."""
