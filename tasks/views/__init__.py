"""What people look at, from a run's tables alone: inspect, trace, rounds, report, charts, card, markdown, compare, texts."""
