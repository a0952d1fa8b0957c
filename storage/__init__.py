"""The only code that opens a run's files."""
