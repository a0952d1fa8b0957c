"""What people look at, from a run's tables alone: inspect, trace, rounds, report, charts, compare, texts."""
